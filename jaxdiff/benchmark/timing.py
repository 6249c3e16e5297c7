"""Clocks: what is timed in turns, how steady it was, and how much memory it took."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class PeakMemory(NamedTuple):
    """The most memory in use at a time until now, in bytes, and whose."""

    bytes: int
    of: str


def peak_memory() -> PeakMemory:
    """Of the fullest local device, where it counts that; else of this process (resident set)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    if peaks:
        return PeakMemory(max(peaks), "the fullest device")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return PeakMemory(peak * (1 if sys.platform == "darwin" else 1024), "the process, in RAM")


def in_turn(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    warmup: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender's calls, which must return only when their work is done.

    They take turns, so that whatever else the machine does slows all of them; the first `warmup`
    calls of each are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        for name, run in contenders.items():
            start = clock()
            run()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def median(seconds: list[float]) -> float:
    """Of at least one."""
    return statistics.median(seconds)


def p90(seconds: list[float]) -> float:
    """What nine in ten do not exceed."""
    return float(np.percentile(seconds, 90))


def standard_error(seconds: list[float]) -> float:
    """Of the median, were the times normal: 1.253 sigma / sqrt(n), sigma = 1.4826 MAD.

    By the median absolute deviation, as a few slow calls say nothing of the others.
    """
    middle = median(seconds)
    mad = statistics.median(abs(s - middle) for s in seconds)
    return 1.253 * 1.4826 * mad / len(seconds) ** 0.5
