"""Time a denoiser's forward pass beside diffusers', on the same weights, inputs and machine.

    pip install torch==2.13.0 && pip install -e '.[parity]'
    python -m benchmarks.against_torch
    python -m benchmarks.against_torch --denoiser FLUX.2 --torch-compile

The contenders take turns, so that other load on the machine slows all of them. Prints the median of
each, their ratio, the time of the first call, and the relative L2 distance of the predictions.
"""

import dataclasses
import time
from typing import Literal

import numpy as np
import torch
import tyro

from benchmarks.torch_denoisers import DENOISERS, contenders
from jaxdiff.benchmark.timing import median, time_in_turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time a denoiser's forward pass."""

    denoiser: Literal["SD1.5", "FLUX.1", "FLUX.2", "Z-Image"] = "SD1.5"
    """The U-Net of Stable Diffusion 1.5, or few blocks of a transformer."""
    batch: int = 2
    """Images in a batch."""
    size: int = 512
    """Side of the images in pixels."""
    heads: int = 24
    """Heads of a transformer, of 128 channels each; FLUX has 24 and Z-Image 30."""
    repeats: int = 5
    """Timed turns of each."""
    torch_compile: bool = False
    """Also time diffusers' model after torch.compile, which takes minutes."""


def main(options: Options) -> None:
    """Print a line for each contender."""
    kind = DENOISERS[options.denoiser]
    made = contenders(kind, batch=options.batch, size=options.size, heads=options.heads)
    runs = {"jaxdiff": made.jaxdiff, "diffusers": lambda: made.diffusers(made.network)}
    if options.torch_compile:
        compiled = torch.compile(made.network)
        runs["diffusers, torch.compile"] = lambda: made.diffusers(compiled)
    first, results = {}, {}
    for name, run in runs.items():
        start = time.perf_counter()
        results[name] = run()
        first[name] = time.perf_counter() - start
    seconds = time_in_turns(runs, warmup=0, repeats=options.repeats)
    medians = {name: median(times) for name, times in seconds.items()}
    for name, taken in medians.items():
        ratio = taken / medians["jaxdiff"]
        print(f"{name}: {taken:.2f} s, {ratio:.2f} times jaxdiff's; first call {first[name]:.1f} s")
    prediction, expected = results["jaxdiff"], results["diffusers"]
    distance = np.linalg.norm(prediction - expected) / np.linalg.norm(expected)
    print(f"relative L2 between the predictions: {distance:.1e}")


if __name__ == "__main__":
    main(tyro.cli(Options))
