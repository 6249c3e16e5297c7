"""Timing in turns, robust statistics of the times, and peak memory."""

import resource
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import jax


class PeakMemory(NamedTuple):
    """Peak memory so far, in bytes, and what it is the memory of."""

    bytes: int
    of: str


def peak_memory() -> PeakMemory:
    """Return the peak memory of the fullest local device; on a CPU, of this process (RSS)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    if peaks:
        return PeakMemory(max(peaks), "the fullest device")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return PeakMemory(peak * (1 if sys.platform == "darwin" else 1024), "the process, in RAM")


def time_in_turns(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    warmup: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time the calls of each contender, which must block until their work is done.

    Contenders take turns, so that other load on the machine slows all of them. The first `warmup`
    calls of each do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        for name, run in contenders.items():
            start = clock()
            run()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def standard_error(seconds: list[float]) -> float:
    """Return the standard error of a median: 1.253 sigma / sqrt(n), with sigma = 1.4826 MAD.

    The median absolute deviation is robust to a few slow calls.
    """
    middle = median(seconds)
    mad = median(abs(s - middle) for s in seconds)
    return 1.253 * 1.4826 * mad / len(seconds) ** 0.5
