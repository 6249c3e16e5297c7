"""Times Stable Diffusion 1.5's U-Net beside diffusers', on the same weights, inputs and machine.

    pip install torch==2.13.0 && pip install -e '.[parity]'
    python -m jaxdiff.benchmark.against_torch --batch 2 --size 64

The two take turns, so that whatever else the machine does slows both. Prints the median of each,
their ratio, the compile times, and how far apart the predictions are.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro

from jaxdiff.benchmark.timing import in_turn, median
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import bind_init, bind_params
from jaxdiff.pretrained import unet_keys
from jaxdiff.pretrained.presets import SD1
from jaxdiff.pretrained.safetensors_io import to_device

STEP, TOKENS = 500, 77  # of the 1000 that it was trained with; of a prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    batch: int = 2
    """Images at a time."""
    size: int = 64
    """Side of the latents; 64 for images of 512 pixels."""
    repeats: int = 5
    """Turns that each takes."""
    torch_compile: bool = False
    """Also time diffusers' model after torch.compile, which takes minutes."""


def main(options: Options) -> None:
    """Prints a line for each contender."""
    torch.manual_seed(0)
    shape = (options.batch, options.size, options.size, SD1.in_channels)
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    tokens = rng.normal(size=(options.batch, TOKENS, SD1.cross_attention_dim)).astype(np.float32)
    config = {k: v for k, v in unet_keys.write_unet_config(SD1).items() if k != "_class_name"}
    theirs = diffusers.UNet2DConditionModel(**config).eval()
    contenders = {
        "jaxdiff": _ours(theirs, x, tokens),
        "diffusers": _theirs(theirs, x, tokens),
    }
    if options.torch_compile:
        contenders["diffusers, torch.compile"] = _theirs(torch.compile(theirs), x, tokens)
    first, results = {}, {}
    for name, run in contenders.items():
        start = time.perf_counter()
        results[name] = run()
        first[name] = time.perf_counter() - start
    seconds = in_turn(contenders, warmup=0, repeats=options.repeats)
    medians = {name: median(times) for name, times in seconds.items()}
    for name, taken in medians.items():
        ratio = taken / medians["jaxdiff"]
        print(
            f"{name}: {taken:.2f} s, {ratio:.2f} of jaxdiff's; the first call {first[name]:.1f} s"
        )
    ours, expected = results["jaxdiff"], results["diffusers"]
    distance = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
    print(f"relative L2 between the predictions: {distance:.1e}")


def _ours(theirs: Any, x: np.ndarray, tokens: np.ndarray) -> Callable[[], np.ndarray]:
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    params = unet_keys.unet_from_torch(tensors, SD1, place=to_device)
    cond = Conditioning(jnp.asarray(tokens))
    inputs = jnp.asarray(x), jnp.full(len(x), (STEP + 1) / 1000), cond

    @jax.jit
    def predict(params, inputs):
        network = bind_params(bind_init(UNet2DConditionConfig.build, SD1), params)
        return network(*inputs)

    return lambda: np.asarray(predict(params, inputs))


def _theirs(model: Any, x: np.ndarray, tokens: np.ndarray) -> Callable[[], np.ndarray]:
    inputs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.tensor(STEP)
    words = torch.from_numpy(tokens)

    def predict() -> np.ndarray:
        with torch.no_grad():
            return model(*inputs, words).sample.numpy().transpose(0, 2, 3, 1)

    return predict


if __name__ == "__main__":
    main(tyro.cli(Options))
