"""Times the input pipeline alone: records read, decoded, transformed and made a batch."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxdiff.benchmark import synthetic
from jaxdiff.benchmark.report import Measured
from jaxdiff.benchmark.timing import peak_memory
from jaxdiff.data.loader import make_dataset
from jaxdiff.training.recipe import Config


def measure(config: Config, *, warmup: int, repeats: int) -> Measured:
    """Seconds of each batch of one host, on the host, taken as fast as they come.

    Raises:
      UserError: the data are missing or unusable.
    """
    images = config.train.batch_size // jax.process_count()
    dataset = make_dataset(
        config.data,
        config.task.tokenize(synthetic.tokenizers(config)),
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        rows=range(images),
    )
    batches = iter(dataset)
    start = time.perf_counter()
    next(batches)
    first = time.perf_counter() - start
    seconds, busy = timed(batches, warmup, repeats)
    memory = peak_memory()
    workers = config.data.workers
    cores = workers or busy / sum(seconds)  # this process's own, or one for each worker
    return Measured(
        name="jaxdiff",
        what="batch",
        seconds=seconds,
        images=images,
        figures={
            "first_batch_s": first,
            "workers": float(workers),
            "images_per_s_per_core": images * len(seconds) / sum(seconds) / max(cores, 1e-9),
            "peak_memory_bytes": memory.bytes,
        },
        notes=[
            "Cores are the workers, each taken to keep one busy."
            if workers
            else f"Cores are the {cores:.2f} that this process kept busy.",
            f"Peak memory is that of {memory.of}.",
        ],
    )


def timed(batches: Iterator[Any], warmup: int, repeats: int) -> tuple[list[float], float]:
    """Seconds from one batch to the next, and those of the processor in this process meanwhile."""
    for _ in itertools.islice(batches, warmup):
        pass
    busy, seconds = time.process_time(), []
    for _ in range(repeats):
        start = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - start)
    return seconds, time.process_time() - busy
