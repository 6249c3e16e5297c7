"""Time the input pipeline alone: reading, decoding, transforming and batching records."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxdiff.benchmark import synthetic
from jaxdiff.benchmark.report import Measurement
from jaxdiff.benchmark.timing import peak_memory
from jaxdiff.data.loader import make_dataset
from jaxdiff.training.profiler import traced
from jaxdiff.training.recipe import Config


def time_batches(
    config: Config, *, warmup: int, repeats: int, trace: str | None = None
) -> Measurement:
    """Time the batches of one host, as fast as the loader yields them.

    `trace` is the folder of a trace of three more batches.

    Raises:
      UserError: the data are missing or unusable.
    """
    images = config.train.batch_size // jax.process_count()
    dataset = make_dataset(
        config.data,
        config.task.tokenize(synthetic.small_tokenizers(config)),
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        rows=range(images),
    )
    batches = iter(dataset)
    start = time.perf_counter()
    next(batches)
    first = time.perf_counter() - start
    seconds, busy = interval_seconds(batches, warmup, repeats)
    if trace is not None:
        with traced(trace):
            interval_seconds(batches, 0, 3)
    memory = peak_memory()
    workers = config.data.workers
    cores = workers or busy / sum(seconds)  # those this process used, or one per worker
    return Measurement(
        name="jaxdiff",
        unit="batch",
        seconds=seconds,
        images=images,
        metrics={
            "first_batch_s": first,
            "workers": float(workers),
            "images_per_s_per_core": images * len(seconds) / sum(seconds) / max(cores, 1e-9),
            "peak_memory_bytes": memory.bytes,
        },
        notes=[
            "Cores: one per worker is assumed."
            if workers
            else f"Cores: this process used {cores:.2f}.",
            f"Peak memory is that of {memory.of}.",
        ],
    )


def interval_seconds(
    batches: Iterator[Any], warmup: int, repeats: int
) -> tuple[list[float], float]:
    """Return the seconds between batches, and the CPU seconds of this process in that time."""
    for _ in itertools.islice(batches, warmup):
        pass
    busy, seconds = time.process_time(), []
    for _ in range(repeats):
        start = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - start)
    return seconds, time.process_time() - busy
