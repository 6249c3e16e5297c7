"""Times how Stable Diffusion 1.5's U-Net is read from a file, beside diffusers doing the same.

    pip install torch==2.13.0 && pip install -e '.[parity]'
    python -m jaxdiff.benchmark.load_against_torch --repeats 5

Each turn is a process of its own, which has imported all that it needs before the clock starts. Two
times are told: until the call returns, and until every weight has been read once, as diffusers on
a CPU maps the file and reads it no sooner than a weight is used. (Linux only.)
"""

import dataclasses
import functools
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax
import numpy as np
import tyro
from etils import epath

from jaxdiff.benchmark.timing import in_turn, median
from jaxdiff.pretrained import unet_keys
from jaxdiff.pretrained.diffusers import DIFFUSION_MODEL
from jaxdiff.pretrained.presets import SD1
from jaxdiff.pretrained.safetensors_io import open_weights, to_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How often it is timed."""

    repeats: int = 5
    """Turns that each takes."""
    warm_memory: bool = False
    """Take as much memory and give it back before the clock starts: what a virtual machine waits
    for when it is handed new memory is then left out."""


class Reading(NamedTuple):
    """What one process took."""

    returned: float  # seconds until the call was back
    read: float  # seconds until every weight had been read
    peak: float  # the most memory in use, beyond that before, of the file's size


def main(options: Options) -> None:
    """Prints a line for each contender."""
    config = {k: v for k, v in unet_keys.write_unet_config(SD1).items() if k != "_class_name"}
    with tempfile.TemporaryDirectory() as folder:
        diffusers.UNet2DConditionModel(**config).save_pretrained(folder)
        readings: dict[str, list[Reading]] = {name: [] for name in LOADERS}
        turns = {
            name: functools.partial(_turn, name, folder, options.warm_memory, found)
            for name, found in readings.items()
        }
        in_turn(turns, warmup=0, repeats=options.repeats)
    for name, found in readings.items():
        returned, read = median([r.returned for r in found]), median([r.read for r in found])
        peak = max(r.peak for r in found)
        held = "" if options.warm_memory else f"; at most {peak:.2f} of the file's size in memory"
        print(
            f"{name}: returned after {returned:.2f} s, every weight read after {read:.2f} s "
            f"({min(r.read for r in found):.2f} to {max(r.read for r in found):.2f}){held}"
        )


def _ours(folder: str) -> Any:
    tensors = open_weights(epath.Path(folder), DIFFUSION_MODEL)
    return jax.block_until_ready(unet_keys.unet_from_torch(tensors, SD1, place=to_device))


LOADERS: dict[str, tuple[Callable[[str], Any], Callable[[Any], list[Any]]]] = {
    "jaxdiff": (_ours, lambda params: [np.asarray(leaf) for leaf in jax.tree.leaves(params)]),
    "diffusers": (
        diffusers.UNet2DConditionModel.from_pretrained,
        lambda model: list(model.parameters()),
    ),
}
"""How each reads a folder, and what its weights are."""


def _turn(name: str, folder: str, warm_memory: bool, found: list[Reading]) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        found.append(process.submit(read, name, folder, warm_memory).result())


def read(name: str, folder: str, warm_memory: bool) -> Reading:
    """Reads a folder by one of the `LOADERS`; a process that has read before says little."""
    size = (Path(folder) / f"{DIFFUSION_MODEL}.safetensors").stat().st_size
    load, weights = LOADERS[name]
    jax.devices()  # starts the backend
    if warm_memory:
        np.ones(size, np.uint8)
    before, start = _peak(), time.perf_counter()
    loaded = load(folder)
    returned = time.perf_counter() - start
    for weight in weights(loaded):
        weight.sum()
    all_read = time.perf_counter() - start
    return Reading(returned, all_read, (_peak() - before) / size)


def _peak() -> int:
    """Of this program alone: what `getrusage` tells was inherited from the one that started it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(tyro.cli(Options))
