"""The denoiser's training step in jaxdiff and in PyTorch on the same weights, timed in turns.

Both read x_t, times, text features and a target, and compute the mean squared error, its gradient,
gradient clipping, AdamW's update and the EMA of the weights: a recipe's step without text encoder
and autoencoder. PyTorch's model is diffusers' for Stable Diffusion's U-Net and
`benchmarks.torch_dit` for the DiT. It runs eagerly, and again under torch.compile.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import (
    UNet2DConditionModel as DiffusersUNet,
)
from flax import nnx
from jaxtyping import PyTree
from torch.optim.swa_utils import get_ema_multi_avg_fn

from benchmarks.torch_dit import TorchDiT, to_torch_names
from jaxdiff.benchmark.report import Measurement
from jaxdiff.benchmark.synthetic import random_like
from jaxdiff.benchmark.timing import median, peak_memory, time_in_turns
from jaxdiff.benchmark.train import TERA, peak_of_device
from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, check_batch, make_mesh
from jaxdiff.distributed.sharding import state_shardings
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import abstract_params, bind_build, bind_params, init_params
from jaxdiff.pretrained import unet_keys
from jaxdiff.training.loop import compile_step
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.recipe import Config
from jaxdiff.training.state import TrainState
from jaxdiff.training.step import init_state
from jaxdiff.training.tasks.base import Task
from jaxdiff.training.tasks.diffusion import DiffusionTask

Denoiser = DiTConfig | UNet2DConditionConfig

COMPARED = 5  # first steps, whose losses are compared
TOLERANCE = 1e-4  # relative difference of their losses in float32; more is an error


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserTask(Task):
    """Train a denoiser alone, on given noisy images and targets."""

    model: Denoiser

    @property
    def by_row(self) -> bool:
        """True: the loss is a mean over images."""
        return True

    def init_params(self, rngs: nnx.Rngs) -> dict[str, Any]:
        """Initialise the denoiser."""
        return init_params(lambda rngs: self.model.build(rngs=rngs), rngs)

    def loss(
        self,
        params: PyTree,
        frozen: PyTree,
        batch: Any,
        key: Any,
        task_state: tuple[()],
        ema: PyTree,
    ) -> Any:
        """Return the mean squared error."""
        network = bind_params(bind_build(self.model), params)
        cond = Conditioning(batch["text"], batch["mask"], batch["pooled"])
        error = network(batch["x"], batch["t"], cond) - batch["target"]
        loss = jnp.mean(error**2)
        return loss, {"loss": loss}, task_state

    def flops_per_image(self, size: int, *, latents: bool = False, text: bool = False) -> float:
        """FLOPs of one image of side `size` in a step, with 77 text tokens."""
        return 3 * self.model.flops(height=size, width=size, text_length=77)


class Contender(NamedTuple):
    """A timed training step, which returns the loss, with the time of its first call.

    `losses` are those of the first steps, which are not timed; `peak_bytes` is the memory of a GPU
    that the contender takes, None on a CPU.
    """

    step: Callable[[], float]
    compile_s: float
    losses: list[float]
    peak_bytes: int | None


def measure(config: Config, *, warmup: int, repeats: int) -> list[Measurement]:
    """Time jaxdiff's step and PyTorch's in turns.

    Raises:
      UserError: PyTorch's side does not support the recipe's denoiser or optimizer, or the two
        compute different losses.
    """
    task, denoiser = _checked(config)
    batch = _batch(config, task, denoiser)
    params = random_like(abstract_params(bind_build(denoiser)))
    contenders = {"jaxdiff": _jaxdiff_step(config, denoiser, params, batch)}
    for name, compiled in (("torch, eager", False), ("torch, compiled", True)):
        contenders[name] = _torch_step(config, denoiser, params, batch, compiled=compiled)
    for name, one in contenders.items():
        pairs = zip(one.losses, contenders["jaxdiff"].losses, strict=True)
        for number, (loss, expected) in enumerate(pairs, 1):
            if not math.isclose(loss, expected, rel_tol=_tolerance(config)):
                raise UserError(
                    f"The loss of {name} at step {number} is {loss} and that of jaxdiff "
                    f"{expected}: expected equal losses; the times are not comparable."
                )
    steps = {name: one.step for name, one in contenders.items()}
    seconds = time_in_turns(steps, warmup=warmup, repeats=repeats)
    height, width, length = *batch["x"].shape[1:3], batch["text"].shape[1]
    flops = 3 * denoiser.flops(height=height, width=width, text_length=length)
    return [
        Measurement(
            name=name,
            unit="step",
            seconds=seconds[name],
            images=config.train.batch_size,
            metrics={
                "first_call_s": one.compile_s,
                "first_loss": one.losses[0],
                "last_loss": one.step(),
                **utilisation(config.train.batch_size * flops, seconds[name], one.peak_bytes),
            },
            notes=["The denoiser alone, without text encoder and autoencoder."],
        )
        for name, one in contenders.items()
    ]


def utilisation(flops: float, seconds: list[float], peak_bytes: int | None) -> dict[str, float]:
    """Return TFLOP/s, MFU and peak memory; without the last two where they are unknown.

    Args:
      flops: of the model in one repeat.
      seconds: of each repeat.
      peak_bytes: memory of the device.
    """
    rate, (peak, _) = flops / TERA / median(seconds), peak_of_device(None)
    found = {"model_tflops_per_s": rate}
    if peak is not None:
        found["mfu"] = rate / peak
    if peak_bytes is not None:
        found["peak_memory_bytes"] = peak_bytes
    return found


def torch_device() -> str:
    """Return the device of PyTorch's side: the GPU where JAX uses one too."""
    on_gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    return "cuda" if on_gpu else "cpu"


class TorchMemory:
    """Peak memory of the GPU that PyTorch takes from now on, beyond what it holds already."""

    def __init__(self) -> None:
        if torch_device() == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        """Return the peak so far; None on a CPU."""
        on_gpu = torch_device() == "cuda"
        return torch.cuda.max_memory_allocated() - self._before if on_gpu else None


def jax_peak() -> int | None:
    """Return the peak memory of the GPU that JAX took so far; None on a CPU."""
    return peak_memory().bytes if torch_device() == "cuda" else None


def _checked(config: Config) -> tuple[DiffusionTask, Denoiser]:
    """Return the recipe's task and denoiser, checked to be supported on both sides."""
    task = config.task
    denoiser = task.model.denoiser if isinstance(task, DiffusionTask) else None
    if not isinstance(denoiser, Denoiser) or type(config.optimizer) is not AdamW:
        raise UserError(
            f"{config.name} cannot be timed against PyTorch: expected a diffusion recipe whose "
            "denoiser is a DiT or Stable Diffusion's U-Net and whose optimizer is AdamW."
        )
    if isinstance(denoiser, UNet2DConditionConfig) and denoiser.added_width is not None:
        raise UserError(
            f"{config.name} cannot be timed against PyTorch: Stable Diffusion XL's U-Net reads "
            "more than x_t, t and tokens; give a recipe of Stable Diffusion 1 or 2."
        )
    assert isinstance(task, DiffusionTask)  # follows from the denoiser's type
    return task, denoiser


def _tolerance(config: Config) -> float:
    return TOLERANCE if config.train.compute == "float32" else 0.05


def _batch(config: Config, task: DiffusionTask, denoiser: Denoiser) -> dict[str, np.ndarray]:
    size, count = config.data.transforms.size, config.train.batch_size
    shape, rng = (count, *task.model.latent_shape(size, size)), np.random.default_rng(0)
    length = task.model.conditioner.text_length
    pooled = denoiser.pooled_width if isinstance(denoiser, DiTConfig) else 1
    normal = {
        "x": shape,
        "target": shape,
        "text": (count, length, denoiser.text_width),
        "pooled": (count, pooled),
    }
    batch = {name: rng.standard_normal(s, np.float32) for name, s in normal.items()}
    # diffusers accepts only integer steps out of 1000.
    batch["t"] = (rng.integers(0, 1000, count) + 1).astype(np.float32) / 1000
    batch["mask"] = np.arange(length) < rng.integers(3, length, (count, 1))
    return batch


def _jaxdiff_step(config: Config, denoiser: Denoiser, params: PyTree, batch: dict) -> Contender:
    devices = jax.devices()
    # PyTorch uses one accelerator, but all cores.
    mesh = make_mesh(MeshConfig(), devices if devices[0].platform == "cpu" else devices[:1])
    check_batch(config.train.batch_size, mesh, 1)
    alone = DenoiserTask(model=denoiser)
    optimizer = config.optimizer.build(config.train.steps)

    def init(params: PyTree) -> TrainState:
        return init_state(alone, optimizer, config.ema, 0, params)

    shardings = state_shardings(jax.eval_shape(init, params), mesh, alone.param_axes())
    state = jax.jit(init, out_shardings=shardings)(params)
    train = dataclasses.replace(config.train, accumulate=1)
    config = dataclasses.replace(config, task=alone, train=train)
    jitted = compile_step(config, mesh, shardings, {})
    on_devices = jax.device_put(batch, batch_sharding(mesh))

    def step() -> float:
        nonlocal state
        state, metrics = jitted(state, {}, on_devices)
        return float(metrics["loss"])

    return _first(step, jax_peak)


def _first(step: Callable[[], float], peak: Callable[[], int | None]) -> Contender:
    start = time.perf_counter()
    losses = [step()]
    compile_s = time.perf_counter() - start
    losses += [step() for _ in range(COMPARED - 1)]
    return Contender(step, compile_s, losses, peak())


def _torch_step(
    config: Config, denoiser: Denoiser, params: PyTree, batch: dict, *, compiled: bool
) -> Contender:
    device, memory = torch_device(), TorchMemory()
    model, predict = _torch_model(denoiser, params)
    model.to(device).train()
    if device == "cuda" and isinstance(denoiser, UNet2DConditionConfig):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster there
    inputs = {name: torch.from_numpy(value).to(device) for name, value in batch.items()}
    settings, ema = config.optimizer, [p.detach().clone() for p in model.parameters()]
    kernels = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": kernels}, {"params": rest, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    total = config.train.steps
    planned = settings.learning_rate_at(jnp.arange(total), total).tolist()
    rates = itertools.chain(planned, itertools.repeat(planned[-1]))
    average = get_ema_multi_avg_fn(config.ema.decay)
    half = config.train.compute == "bfloat16"

    def loss_of() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            prediction = predict(inputs)
        return torch.mean((prediction.float() - inputs["target"]) ** 2)

    forward = torch.compile(loss_of) if compiled else loss_of

    def step() -> float:
        loss = forward()
        loss.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        rate = next(rates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            average(ema, list(model.parameters()), 0)
        if device == "cuda":
            torch.cuda.synchronize()  # wait for the update
        return loss.item()

    return _first(step, memory.peak)


def _torch_model(
    denoiser: Any, params: PyTree
) -> tuple[torch.nn.Module, Callable[[dict[str, torch.Tensor]], torch.Tensor]]:
    """Return the same network with the same weights, and a function that predicts from a batch."""
    if isinstance(denoiser, DiTConfig):
        dit = TorchDiT(denoiser)
        dit.load_state_dict(to_torch_names(params))
        return dit, lambda b: dit(b["x"], b["t"], b["text"], b["pooled"], b["mask"])
    settings = unet_keys.write_unet_config(denoiser)
    del settings["_class_name"]
    model = DiffusersUNet(**settings)
    tensors = unet_keys.unet_to_torch(params)
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()})

    def predict(b: dict[str, torch.Tensor]) -> torch.Tensor:
        times = torch.round(b["t"] * 1000).long() - 1
        out = model(b["x"].permute(0, 3, 1, 2), times, b["text"]).sample
        return out.permute(0, 2, 3, 1)

    if denoiser.remat != "none":
        model.enable_gradient_checkpointing()
    return model, predict
