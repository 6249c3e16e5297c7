"""Time Stable Diffusion 1.5's U-Net beside diffusers', on the same weights, inputs and machine.

    pip install torch==2.13.0 && pip install -e '.[parity]'
    python -m benchmarks.against_torch --batch 2 --size 64

The two take turns, so that other load on the machine slows both. Prints the median of each, their
ratio, the time of the first call, and the relative L2 distance between the predictions.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from diffusers.models.unets.unet_2d_condition import (
    UNet2DConditionModel as DiffusersUNet,
)

from jaxdiff.benchmark.timing import median, time_in_turns
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.layers import bind_build, bind_params
from jaxdiff.pretrained import unet_keys
from jaxdiff.pretrained.presets import SD1
from jaxdiff.pretrained.safetensors_io import to_device

STEP, TOKENS = 500, 77  # one of 1000 training steps; tokens of a prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time the U-Net's forward pass."""

    batch: int = 2
    """Images in a batch."""
    size: int = 64
    """Side of the latents; 64 for images of 512 pixels."""
    repeats: int = 5
    """Timed turns of each."""
    torch_compile: bool = False
    """Also time diffusers' model after torch.compile, which takes minutes."""


def main(options: Options) -> None:
    """Print a line for each contender."""
    torch.manual_seed(0)
    shape = (options.batch, options.size, options.size, SD1.in_channels)
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    tokens = rng.normal(size=(options.batch, TOKENS, SD1.cross_attention_dim)).astype(np.float32)
    config = {k: v for k, v in unet_keys.write_unet_config(SD1).items() if k != "_class_name"}
    reference = DiffusersUNet(**config).eval()
    contenders = {
        "jaxdiff": _jaxdiff(reference, x, tokens),
        "diffusers": _torch(reference, x, tokens),
    }
    if options.torch_compile:
        contenders["diffusers, torch.compile"] = _torch(torch.compile(reference), x, tokens)
    first, results = {}, {}
    for name, run in contenders.items():
        start = time.perf_counter()
        results[name] = run()
        first[name] = time.perf_counter() - start
    seconds = time_in_turns(contenders, warmup=0, repeats=options.repeats)
    medians = {name: median(times) for name, times in seconds.items()}
    for name, taken in medians.items():
        ratio = taken / medians["jaxdiff"]
        print(f"{name}: {taken:.2f} s, {ratio:.2f} times jaxdiff's; first call {first[name]:.1f} s")
    prediction, expected = results["jaxdiff"], results["diffusers"]
    distance = np.linalg.norm(prediction - expected) / np.linalg.norm(expected)
    print(f"relative L2 between the predictions: {distance:.1e}")


def _jaxdiff(reference: Any, x: np.ndarray, tokens: np.ndarray) -> Callable[[], np.ndarray]:
    tensors = {name: value.numpy() for name, value in reference.state_dict().items()}
    params = unet_keys.unet_from_torch(tensors, SD1, place=to_device)
    cond = Conditioning(jnp.asarray(tokens))
    inputs = jnp.asarray(x), jnp.full(len(x), (STEP + 1) / 1000), cond

    @jax.jit
    def predict(params, inputs):
        return bind_params(bind_build(SD1), params)(*inputs)

    return lambda: np.asarray(predict(params, inputs))


def _torch(model: Any, x: np.ndarray, tokens: np.ndarray) -> Callable[[], np.ndarray]:
    inputs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.tensor(STEP)
    text = torch.from_numpy(tokens)

    def predict() -> np.ndarray:
        with torch.no_grad():
            return model(*inputs, text).sample.numpy().transpose(0, 2, 3, 1)

    return predict


if __name__ == "__main__":
    main(tyro.cli(Options))
