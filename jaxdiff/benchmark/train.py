"""Times a recipe's training step: the very one of the training loop, fed as there."""

import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxdiff.benchmark import synthetic
from jaxdiff.benchmark.report import Measured
from jaxdiff.benchmark.timing import median, peak_memory
from jaxdiff.data.loader import ON_DEVICE, host_rows, make_dataset, to_device
from jaxdiff.distributed.chips import find_chip
from jaxdiff.distributed.mesh import batch_sharding, check_batch, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.training.loop import check_axes, compile_step, flops_per_image
from jaxdiff.training.recipe import Config

TERA = 1e12


def measure(
    config: Config, *, warmup: int, repeats: int, real: bool, peak_tflops: float | None
) -> Measured:
    """The step's seconds, from the end of one to the end of the next, as in the training loop.

    There the next step is dispatched before the last one's metrics are read; so it is here.

    Args:
      config: the recipe.
      warmup: steps before those that count.
      repeats: steps that count.
      real: feed it from the recipe's data, or with one batch at random over and over.
      peak_tflops: what one device can do, in TFLOP/s; by default the table's of its kind.

    Raises:
      UserError: mesh, batch or data do not fit; or the peak is not positive.
    """
    flops = flops_per_image(config) * config.train.batch_size
    peak, note = peak_of_device(peak_tflops)
    mesh = make_mesh(config.mesh)
    check_batch(config.train.batch_size, mesh, config.train.accumulate)
    check_axes(config, mesh)
    state, shardings = synthetic.fresh_state(config, mesh)
    frozen = synthetic.frozen_parts(config, mesh)
    batches = _batches(config, mesh, real)
    first = next(batches)
    jitted: Any = compile_step(config, mesh, shardings, jax.tree.map(lambda x: x.sharding, frozen))
    start = time.perf_counter()
    step = jitted.lower(state, frozen, first).compile()
    compile_s = time.perf_counter() - start

    seconds, waited = _timed(step, state, frozen, batches, warmup, repeats)
    memory = peak_memory()
    figures = {
        "compile_s": compile_s,
        "peak_memory_bytes": memory.bytes,
        "model_tflops_per_step": flops / TERA,
        "model_tflops_per_s_per_device": flops / TERA / median(seconds) / jax.device_count(),
    }
    notes = [f"Peak memory is that of {memory.of}.", note]
    if real:
        figures["data_wait"] = waited / sum(seconds)
    if peak is not None:
        figures["mfu"] = figures["model_tflops_per_s_per_device"] / peak
    return Measured(
        name="jaxdiff",
        what="step",
        seconds=seconds,
        images=config.train.batch_size,
        figures=figures,
        notes=notes,
    )


def _timed(
    step: Any, state: Any, frozen: Any, batches: Iterator[Any], warmup: int, repeats: int
) -> tuple[list[float], float]:
    """Seconds of each step that counts, and those spent on waiting for their batches."""
    seconds, waited, pending, last = [], 0.0, None, time.perf_counter()
    for i in range(-1, warmup + repeats):
        start = time.perf_counter()
        batch = next(batches)
        waited += (time.perf_counter() - start) * (i >= warmup)
        state, metrics = step(state, frozen, batch)
        if pending is not None:
            jax.block_until_ready(pending)
            now = time.perf_counter()
            if i >= warmup:
                seconds.append(now - last)
            last = now
        pending = metrics
    jax.block_until_ready(pending)
    return seconds, waited


def peak_of_device(given: float | None) -> tuple[float | None, str]:
    """TFLOP/s to divide by for model FLOP utilisation, if they are known, and a note of whose.

    Raises:
      UserError: those that were given are not positive.
    """
    if given is not None:
        if given <= 0:
            raise UserError(f"--peak-tflops is {given}: expected a positive number.")
        return given, f"Utilisation is of the {given:g} TFLOP/s that were given."
    kind = jax.devices()[0].device_kind
    chip = find_chip(kind)
    if chip is None:
        return None, (
            f"No utilisation: the peak of a {kind!r} is not in the table; give --peak-tflops."
        )
    peak = chip.flops / TERA
    return peak, f"Utilisation is of {peak:g} TFLOP/s in bfloat16 ({chip.source})."


def _batches(config: Config, mesh: Any, real: bool) -> Iterator[dict[str, jax.Array]]:
    """Batches on the devices without end."""
    if not real:
        batch = synthetic.batch(config, mesh)
        while True:
            yield batch
    sharding, size = batch_sharding(mesh), config.train.batch_size
    dataset = make_dataset(
        config.data,
        config.task.tokenize(synthetic.tokenizers(config)),
        batch_size=size,
        seed=config.train.seed,
        rows=host_rows(sharding, size),
    )
    prefetch = config.data.prefetch
    for batch in to_device(dataset, sharding, batch_size=size, prefetch=prefetch):
        yield {name: batch[name] for name in ON_DEVICE if name in batch}
