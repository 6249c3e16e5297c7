"""Time a recipe's training step, compiled and fed as in the training loop."""

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import jax

from jaxdiff.benchmark import synthetic
from jaxdiff.benchmark.report import Measurement
from jaxdiff.benchmark.timing import peak_memory
from jaxdiff.data.loader import ON_DEVICE, device_batches, host_rows, make_dataset
from jaxdiff.distributed.chips import find_chip
from jaxdiff.distributed.mesh import batch_sharding, check_batch, make_mesh
from jaxdiff.training.abstract import check_axes, flops_per_image
from jaxdiff.training.loop import compile_step
from jaxdiff.training.profiler import traced
from jaxdiff.training.recipe import Config

TERA = 1e12


def time_training(
    config: Config,
    *,
    warmup: int,
    repeats: int,
    real: bool,
    peak_tflops: float | None,
    trace: str | None = None,
) -> Measurement:
    """Time the step, from the end of one to the end of the next.

    As in the training loop, the next step is dispatched before the last one's metrics are read.

    Args:
      config: the recipe.
      warmup: steps before those that count.
      repeats: steps that count.
      real: use the recipe's data instead of one random batch.
      peak_tflops: peak TFLOP/s of one device; by default from its data sheet.
      trace: folder of a trace of three more steps.

    Raises:
      UserError: mesh, batch or data do not fit.
    """
    flops = flops_per_image(config) * config.train.batch_size
    peak, note = peak_of_device(peak_tflops)
    mesh = make_mesh(config.mesh)
    check_batch(config.train.batch_size, mesh, config.train.accumulate)
    check_axes(config, mesh)
    state, shardings = synthetic.initial_state(config, mesh)
    frozen = synthetic.random_frozen(config, mesh)
    batches = _batches(config, mesh, real)
    first = next(batches)
    jitted: Any = compile_step(config, mesh, shardings, jax.tree.map(lambda x: x.sharding, frozen))
    start = time.perf_counter()
    step = jitted.lower(state, frozen, first).compile()
    compile_s = time.perf_counter() - start

    state, seconds, waited = _timed(step, state, frozen, batches, warmup, repeats)
    memory = peak_memory()
    if trace is not None:
        with traced(trace):
            _timed(step, state, frozen, batches, 0, 2)
    metrics = {
        "compile_s": compile_s,
        "peak_memory_bytes": memory.bytes,
        "model_tflops_per_step": flops / TERA,
        "model_tflops_per_s_per_device": flops / TERA / median(seconds) / jax.device_count(),
    }
    notes = [f"Peak memory is that of {memory.of}.", note]
    if real:
        metrics["data_wait"] = waited / sum(seconds)
    if peak is not None:
        metrics["mfu"] = metrics["model_tflops_per_s_per_device"] / peak
    return Measurement(
        name="jaxdiff",
        unit="step",
        seconds=seconds,
        images=config.train.batch_size,
        metrics=metrics,
        notes=notes,
    )


def _timed(
    step: Any, state: Any, frozen: Any, batches: Iterator[Any], warmup: int, repeats: int
) -> tuple[Any, list[float], float]:
    """Return the state, the seconds of each step after the warm-up, and those of waiting for data.

    One more step than these is taken.
    """
    seconds, waited, pending, last = [], 0.0, None, time.perf_counter()
    for i in range(-1, warmup + repeats):
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation("data"):
            batch = next(batches)
        waited += (time.perf_counter() - start) * (i >= warmup)
        with jax.profiler.StepTraceAnnotation("train", step_num=i + 1):
            state, step_metrics = step(state, frozen, batch)
        if pending is not None:
            jax.block_until_ready(pending)
            now = time.perf_counter()
            if i >= warmup:
                seconds.append(now - last)
            last = now
        pending = step_metrics
    jax.block_until_ready(pending)
    return state, seconds, waited


def peak_of_device(given: float | None) -> tuple[float | None, str]:
    """Return the peak TFLOP/s of one device, None if unknown, and a note on its source."""
    if given is not None:
        return given, f"Utilisation is relative to --peak-tflops {given:g}."
    kind = jax.devices()[0].device_kind
    chip = find_chip(kind)
    if chip is None:
        return None, f"No utilisation: the table of chips has no {kind!r}; give --peak-tflops."
    peak = chip.flops / TERA
    return peak, f"Utilisation is relative to {peak:g} TFLOP/s in bfloat16 ({chip.source})."


def _batches(config: Config, mesh: Any, real: bool) -> Iterator[dict[str, jax.Array]]:
    """Yield batches on the devices, without end."""
    if not real:
        batch = synthetic.random_batch(config, mesh)
        while True:
            yield batch
    sharding, size = batch_sharding(mesh), config.train.batch_size
    dataset = make_dataset(
        config.data,
        config.task.tokenize(synthetic.small_tokenizers(config)),
        batch_size=size,
        seed=config.train.seed,
        rows=host_rows(sharding, size),
    )
    prefetch = config.data.prefetch
    for batch in device_batches(dataset, sharding, batch_size=size, prefetch=prefetch):
        yield {name: batch[name] for name in ON_DEVICE if name in batch}
