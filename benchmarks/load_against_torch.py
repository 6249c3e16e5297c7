"""Time loading Stable Diffusion 1.5's U-Net from a file, beside diffusers.

    pip install torch==2.13.0 && pip install -e '.[parity]'
    python -m benchmarks.load_against_torch --repeats 5

Each turn runs in a process of its own, which imports everything before the clock starts. Two times
are printed: until the call returns, and until every weight has been read once, because diffusers on
a CPU maps the file and reads a weight only when it is used. Linux only.
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

import jax
import numpy as np
import tyro
from diffusers.models.unets.unet_2d_condition import (
    UNet2DConditionModel as DiffusersUNet,
)
from etils import epath

from jaxdiff.benchmark.timing import median, time_in_turns
from jaxdiff.pretrained import unet_keys
from jaxdiff.pretrained.diffusers_folder import DIFFUSION_MODEL
from jaxdiff.pretrained.presets import SD1
from jaxdiff.pretrained.safetensors_io import open_weights, to_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time loading the U-Net."""

    repeats: int = 5
    """Timed turns of each."""
    warm_memory: bool = False
    """Allocate and free as much memory before the clock starts, to exclude the time that a virtual
    machine takes to provide new memory."""


class LoadTimes(NamedTuple):
    """Times and memory of one process."""

    returned: float  # seconds until the call returned
    read: float  # seconds until every weight was read
    peak: float  # additional peak memory, relative to the file's size


def main(options: Options) -> None:
    """Print a line for each contender."""
    config = {k: v for k, v in unet_keys.write_unet_config(SD1).items() if k != "_class_name"}
    with tempfile.TemporaryDirectory() as folder:
        DiffusersUNet(**config).save_pretrained(folder)
        times: dict[str, list[LoadTimes]] = {name: [] for name in LOADERS}
        turns = {
            name: functools.partial(_turn, name, folder, options.warm_memory, found)
            for name, found in times.items()
        }
        time_in_turns(turns, warmup=0, repeats=options.repeats)
    for name, found in times.items():
        returned, read = median([r.returned for r in found]), median([r.read for r in found])
        peak = max(r.peak for r in found)
        memory = "" if options.warm_memory else f"; peak memory {peak:.2f} of the file's size"
        print(
            f"{name}: returned after {returned:.2f} s, every weight read after {read:.2f} s "
            f"({min(r.read for r in found):.2f} to {max(r.read for r in found):.2f}){memory}"
        )


def _load(folder: str) -> Any:
    tensors = open_weights(epath.Path(folder), DIFFUSION_MODEL)
    return jax.block_until_ready(unet_keys.unet_from_torch(tensors, SD1, place=to_device))


LOADERS: dict[str, tuple[Callable[[str], Any], Callable[[Any], list[Any]]]] = {
    "jaxdiff": (_load, lambda params: [np.asarray(leaf) for leaf in jax.tree.leaves(params)]),
    "diffusers": (
        DiffusersUNet.from_pretrained,
        lambda model: list(model.parameters()),
    ),
}
"""For each contender, how it loads a folder, and how its weights are listed."""


def _turn(name: str, folder: str, warm_memory: bool, found: list[LoadTimes]) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        found.append(process.submit(time_loading, name, folder, warm_memory).result())


def time_loading(name: str, folder: str, warm_memory: bool) -> LoadTimes:
    """Load a folder with one of the `LOADERS`, in a process that has loaded nothing before."""
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
    return LoadTimes(returned, all_read, (_peak() - before) / size)


def _peak() -> int:
    """Peak memory of this process in bytes; `getrusage` would include the parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(tyro.cli(Options))
