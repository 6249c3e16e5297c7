"""Hold out a share of the records by a hash of each, whatever their order and their number."""

import functools
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import rich.progress
from jaxtyping import Float64, Int

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.sources.base import digest_of
from jaxdiff.io.terminal import console

Indices = Int[np.ndarray, " _"]


def split_records(source: Any, held_out: float) -> tuple[Indices, Indices]:
    """Return the indices of the records to train on, ascending, and of those held out.

    A record is held out if the digest of its identity (`digest_of`), as a number in [0, 1), is less
    than `held_out`. Equal records are on the same side, a larger share contains a smaller one, and
    new records move none. Cached latents are on the side of their images. Those held out are in the
    order of their digests: a part from the start is stable too. Records that cannot be read are
    left to training, which reports them.
    """
    values = record_hashes(source)
    out = np.flatnonzero(values < held_out)
    return np.flatnonzero(values >= held_out), out[np.argsort(values[out], kind="stable")]


def record_hashes(source: Any) -> Float64[np.ndarray, " n"]:
    """Return the digest of each record's identity as a number in [0, 1), 1 for unreadable ones."""
    try:
        return _cached_hashes(source)
    except TypeError:  # a source that cannot be hashed itself
        return _hashes(source)


def read_all(
    source: Any, read: Callable[[int], Any], description: str, threads: int = 8
) -> list[Any]:
    """Return `read(index)` of all records, with a bar of progress."""
    with ThreadPool(threads) as pool:  # bound by storage, not by the CPU
        return list(
            rich.progress.track(
                pool.imap(read, range(len(source)), chunksize=64),
                description=description,
                total=len(source),
                transient=True,
                console=console(stderr=True),
            )
        )


def _hashes(source: Any) -> np.ndarray:
    """Return a number in [0, 1) for each record."""

    def number(index: int) -> float:
        try:
            return int(digest_of(source, index), 16) / 2**48
        except RecordError:
            return 1.0

    return np.array(read_all(source, number, "Choosing the held-out records"))


@functools.lru_cache(maxsize=4)
def _cached_hashes(source: Any) -> np.ndarray:
    return _hashes(source)
