"""The training loop: train a recipe in a folder, and resume it there."""

import functools
import logging
import re
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath, epy
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdiff.config.serialization import to_json, types_in
from jaxdiff.data.bad_records import Account, BadRecords, account_of
from jaxdiff.data.loader import ON_DEVICE, WORKER_DIED, device_batches, host_rows, make_dataset
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.data.workers import signals_blocked
from jaxdiff.distributed.chips import peak_flops
from jaxdiff.distributed.mesh import batch_sharding, check_batch, make_mesh
from jaxdiff.distributed.multihost import from_host, is_host0, run_on_host0, sum_over_hosts
from jaxdiff.distributed.sharding import replicated, state_shardings
from jaxdiff.distributed.xla_flags import as_options
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Evaluator, Report
from jaxdiff.io.terminal import printable, write_text
from jaxdiff.models.layers import cast
from jaxdiff.pretrained.bundle import CHECKPOINTS
from jaxdiff.training.abstract import (
    abstract_state,
    check_axes,
    flops_per_image,
    host_parts,
    state_initializer,
)
from jaxdiff.training.best import NOTES, BestModel
from jaxdiff.training.cached_latents import check_cache, check_encoders
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.goodput import Goodput
from jaxdiff.training.initial_weights import load_frozen, load_parts
from jaxdiff.training.metrics import MetricsWriter, Progress, Throughput
from jaxdiff.training.post_hoc_ema import Snapshots
from jaxdiff.training.preemption import Preemption, stop_on_signal
from jaxdiff.training.prepare_shards import with_cache
from jaxdiff.training.profiler import StepTrace
from jaxdiff.training.recipe import Config
from jaxdiff.training.state import TrainState, fingerprint
from jaxdiff.training.step import TrainStep, make_train_step
from jaxdiff.training.tasks.base import Batch, Metrics, means
from jaxdiff.training.workdir import CACHE, SUMMARY, open_run

with epy.lazy_imports():
    import grain

_NAMED = 5  # records left out that the log names

Tokenizers = Mapping[str, TextTokenizer]
Evaluate = Callable[[TrainState, PyTree, Tokenizers, tuple[Evaluator, ...]], Report]
"""Runs evaluators on a state, given the frozen parameters and the tokenizers."""


class Result(NamedTuple):
    """The end of a run."""

    summary: dict[str, Any]  # step, fingerprint, speed
    state: TrainState
    frozen: PyTree
    tokenizers: Tokenizers
    finished: bool  # False if a signal stopped it before its last step
    stopped_by: signal.Signals | None = None


def train(
    config: Config,
    out: epath.PathLike,
    *,
    fresh: bool = False,
    evaluate: Evaluate | None = None,
    finish: Callable[[Result], Report] | None = None,
    log: Callable[[str], None] = write_text,
) -> Result:
    """Train a recipe to its last step, from the newest checkpoint in `out`.

    Args:
      config: the recipe.
      out: the run's folder, local or `gs://`; created if missing.
      fresh: remove an earlier run from the folder and start at step 0.
      evaluate: runs the evaluators that are due after a step before the last.
      finish: called after the last step, once signals have their usual effect again and the data
        workers have stopped; its report goes to the run's metrics.
      log: called with one sentence at a time.

    Returns:
      The end of the run; not `finished` if SIGTERM or SIGINT stopped it, after saving its state.

    Raises:
      UserError: `out` holds a run of another recipe; data or mesh do not fit; the disk is full; too
        many records are bad; a data worker dies; or too many updates in a row are not finite.
    """
    out = epath.Path(out)
    mesh = make_mesh(config.mesh)
    check_batch(config.train.batch_size, mesh, config.train.accumulate)
    check_axes(config, mesh)
    check_cache(config)
    config, tokenizers, account = _open_data(config, out, fresh=fresh, log=log)
    host = load_frozen(config, out)
    check_encoders(config, host, tokenizers)
    frozen, unread = _place_frozen(config, mesh, host, tokenizers)
    with ExitStack() as whole, ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(out / CHECKPOINTS, keep=config.train.keep, report=log)
        )
        snapshots = stack.enter_context(Snapshots(out, config.ema.post_hoc, log))
        state, shardings = _start(config, mesh, checkpoints, host, tokenizers, log)
        del host
        first = int(state.step)
        snapshots.resume(first, state.averages)
        rows = host_rows(batch_sharding(mesh), config.train.batch_size)
        batches = _batches(config, tokenizers, mesh, rows, first)
        stack.callback(batches.close)
        stop = stack.enter_context(stop_on_signal(mesh, log))
        run = _Run(config, out, first, len(rows), account, log)
        whole.enter_context(run.writer)
        stack.enter_context(run.progress)
        stack.enter_context(run.trace)
        best = whole.enter_context(
            _best_model(config, out, tokenizers, checkpoints, first, evaluate, log)
        )
        step = compile_step(config, mesh, shardings, jax.tree.map(lambda x: x.sharding, frozen))

        def after(number: int, state: TrainState) -> None:
            saves = number % config.train.checkpoint_every == 0
            if saves and config.best is None:  # else with what the evaluation decides
                _save(state, checkpoints, snapshots, best)
            snapshots.after(number, state.averages)
            due = _due(config, number)
            if due and evaluate is not None:
                with run.throughput.timed("pause"):
                    report = evaluate(state, frozen | unread, tokenizers, due)
                    run.writer.write_report(number, report)
                    best.after(number, report.scalars, state.ema)
            if saves and config.best is not None:
                _save(state, checkpoints, snapshots, best)

        if first < config.train.steps and not best.should_stop:  # a finished run is extended
            run_on_host0(lambda: (out / SUMMARY).unlink(missing_ok=True))
        stops = lambda: stop.should_stop or best.should_stop  # noqa: E731
        state = _take_steps(
            run, stop, stops, lambda s, b: step(s, frozen, b), state, batches, after
        )
        number = int(state.step)
        finished = number == config.train.steps or best.should_stop
        if number > first:
            if finished:
                snapshots.save(number, state.averages)
            _save(state, checkpoints, snapshots, best)
        checkpoints.wait()
        stack.close()
        summary = {"step": number, "fingerprint": fingerprint(state), **run.totals()}
        stopped_by = None if finished else stop.signal
        result = Result(summary, state, frozen | unread, tokenizers, finished, stopped_by)
        if finished:
            summary |= best.summary
            report = finish(result) if finish is not None else Report()
            run.writer.write_report(number, report)
            best.after(number, report.scalars, state.ema)
            best.finish()
            summary |= best.summary if report.scalars else {}
    return result


def _best_model(
    config: Config,
    out: epath.Path,
    tokenizers: Tokenizers,
    checkpoints: Checkpoints,
    first: int,
    evaluate: Evaluate | None,
    log: Callable[[str], None],
) -> BestModel:
    """Return what follows the best step, from the checkpoint of step `first`."""
    return BestModel(
        out,
        config=to_json(config),
        tokenizers=tokenizers,
        settings=config.best if evaluate is not None else None,
        evaluators=config.evaluators,
        notes=checkpoints.note(NOTES),
        restored=first,
        report=log,
    )


def _save(
    state: TrainState, checkpoints: Checkpoints, snapshots: Snapshots, best: BestModel
) -> None:
    """Save a checkpoint; a run that resumes there has all that was written before it."""
    snapshots.wait()
    best.wait()
    checkpoints.save(state, best.notes)


def _open_data(
    config: Config, out: epath.Path, *, fresh: bool, log: Callable[[str], None]
) -> tuple[Config, Tokenizers, Account]:
    """Open a run's folder; return the recipe, on cached latents if it sets them, and what it reads.

    The account of its records is logged.
    """
    config.data.source.check()  # before an earlier run is removed because of a typo
    account_of(config.data.source).check(config.data.max_bad_fraction)
    tokenizers = open_run(config, out, fresh=fresh, log=log)
    config, account = with_cache(config, out / CACHE)
    log(account.text())
    for reject in account.left_out.rejects[:_NAMED]:
        log(f"Left out {reject}")
    return config, tokenizers, account


def _place_frozen(
    config: Config, mesh: Mesh, host: PyTree, tokenizers: Tokenizers
) -> tuple[PyTree, PyTree]:
    """Place frozen parts and constants, in the compute type and sharded like trained parameters.

    Parts that no step reads are returned apart, on the host.
    """
    away = host_parts(config)
    constants = cast(host | config.task.constants(tokenizers), config.train.compute)
    read = {name: part for name, part in constants.items() if name not in away}
    placed = state_shardings(read, mesh, config.task.param_axes())
    return from_host(read, placed), {name: constants[name] for name in away}


def _take_steps(
    run: "_Run",
    stop: Preemption,
    stops: Callable[[], bool],
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    batches: "grain.DatasetIterator",
    after: Callable[[int, TrainState], None],
) -> TrainState:
    """Take steps up to the last one, or to the one after which `stops()`; return the state.

    `after` is called with the number of each step, once it is dispatched, and the state.
    """
    number, compiled, pending = int(state.step), set(), None
    while number < run.train.steps and not stops():
        with run.throughput.timed("pause"):
            run.trace.before(number + 1, state)
        batch, skipped = run.take(batches)
        shape = tuple(x.shape for x in jax.tree.leaves(batch))
        compiling = nullcontext() if shape in compiled else run.throughput.timed("compile")
        with compiling, jax.profiler.StepTraceAnnotation("train", step_num=number + 1):
            state, metrics = step(state, batch)
        compiled.add(shape)
        stop.vote()
        number += 1
        if pending is not None:  # read a step's metrics once the next step is dispatched
            run.read(*pending)
            stop.poll()
        pending = (number, metrics, skipped)
        after(number, state)
    if pending is not None:
        run.read(*pending)
    return state


def _due(config: Config, step: int) -> tuple[Evaluator, ...]:
    """Return the evaluators whose interval ends at a step before the last."""
    if step == config.train.steps:
        return ()
    return tuple(e for e in config.evaluators if e.every and step % e.every == 0)


def compile_step(
    config: Config, mesh: Mesh, shardings: TrainState, frozen_shardings: PyTree
) -> TrainStep:
    """Jit the step of a recipe with sharded inputs and outputs, donating the old state.

    It is traced under the mesh, from which activations and attention derive their shardings.
    """
    on_any_mesh = make_train_step(
        config.task,
        config.optimizer.build(config.train.steps),
        config.ema,
        accumulate=config.train.accumulate,
        compute=config.train.compute,
        reduce=config.train.reduce,
    )

    def train_step(state: TrainState, frozen: PyTree, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return on_any_mesh(state, frozen, batch)

    return jax.jit(
        train_step,
        in_shardings=(shardings, frozen_shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=as_options(config.compiler.known_flags(mesh)) or None,
    )


def _start(
    config: Config,
    mesh: Mesh,
    checkpoints: Checkpoints,
    frozen: PyTree,
    tokenizers: Tokenizers,
    log: Callable[[str], None],
) -> tuple[TrainState, TrainState]:
    """Return the newest checkpoint's state, or a fresh one, and its shardings."""
    abstract = abstract_state(config)
    shardings = state_shardings(abstract, mesh, config.task.param_axes())
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    state = checkpoints.restore(placed)
    if state is not None:
        log(f"Resuming at step {int(state.step)} of {config.train.steps}.")
        return state, shardings
    init = jax.jit(state_initializer(config), out_shardings=shardings)
    task = config.task
    parts = load_parts(task.initial_parts(), types_in(config))
    parts |= task.init_from_frozen(frozen, tokenizers)
    # From the host: jit cannot move an array from one device to a mesh of several.
    return init(jax.device_get(parts)), shardings


def _batches(
    config: Config, tokenizers: Tokenizers, mesh: Mesh, rows: list[int], first: int
) -> "grain.DatasetIterator":
    """Iterate over batches on the devices from number `first` on; this host reads `rows`."""
    size = config.train.batch_size
    dataset = make_dataset(
        config.data,
        config.task.tokenize(tokenizers),
        batch_size=size,
        seed=config.train.seed,
        rows=rows,
        first=first,
    )
    sharding = batch_sharding(mesh)
    prefetch = config.data.prefetch
    batches = device_batches(dataset, sharding, batch_size=size, prefetch=prefetch)
    with signals_blocked():  # in the thread that starts the workers, and so in them
        iterator = iter(batches)
        iterator.start_prefetch()
    return iterator


class _Run:
    """Counts, metrics and progress of one call of `train`."""

    def __init__(
        self,
        config: Config,
        out: epath.Path,
        first: int,
        rows: int,
        account: Account,
        log: Callable[[str], None],
    ):
        train = config.train
        self.account = account
        self.rows = rows  # rows of a batch that this host reads
        self.train = train
        self.bad = BadRecords(config.data.max_bad_fraction)
        self.window: dict[str, np.ndarray] = {}
        self.writer = MetricsWriter(
            out, resume_from=first, wandb=train.wandb, config=to_json(config)
        )
        self.goodput = Goodput(
            out, first=first, batch_size=train.batch_size, records=self.writer.earlier
        )
        self.progress = Progress(train.steps, start=first)
        self.trace = StepTrace(out, first=train.profile_at, steps=train.profile_steps, log=log)
        peak = peak_flops(jax.devices()[0])
        self.throughput = Throughput(
            train.batch_size,
            flops_per_image=flops_per_image(config),
            peak_flops=peak and peak * jax.device_count(),
        )
        self.rates: list[dict[str, float]] = []
        self.learning_rate = functools.partial(
            config.optimizer.learning_rate_at, total_steps=train.steps
        )

    def take(self, batches: Any) -> tuple[dict[str, Any], int]:
        """Return the next batch and its number of skipped records, which are logged."""
        with self.throughput.timed("data"), jax.profiler.TraceAnnotation("data"):
            try:
                batch = next(batches)
            except RuntimeError as error:
                if (died := re.search(WORKER_DIED, str(error))) is None:
                    raise
                raise UserError(
                    f"A data worker died (exit code {died[1]}; -9 means out of memory): run the "
                    "same command again, which resumes from the last checkpoint, with a smaller "
                    "data.workers or data.prefetch."
                ) from error
        for name in batch["bad"]:
            logging.getLogger(__name__).warning("Skipped %s", printable(name))
        self.bad.add(batch["skipped"], batch["bad"], self.rows - batch["skipped"])
        return {name: batch[name] for name in ON_DEVICE if name in batch}, batch["skipped"]

    def read(self, step: int, metrics: dict[str, jax.Array], skipped: int) -> None:
        """Add a step's metrics to the window; at the window's end, write a line.

        Raises:
          UserError: too many updates in a row were not finite.
        """
        with self.throughput.timed("device"), jax.profiler.TraceAnnotation("device wait"):
            values = {k: np.asarray(v, np.float64) for k, v in jax.device_get(metrics).items()}
        in_a_row = int(values.pop("nonfinite_in_a_row"))
        if in_a_row >= self.train.max_nonfinite:
            raise UserError(
                f"The loss or its gradient was not finite for {in_a_row} steps in a row, until "
                f"step {step}; lower optimizer.learning_rate, or check the data, and start again "
                "with --fresh or resume from the last checkpoint."
            )
        if in_a_row and is_host0():
            logging.getLogger(__name__).warning(
                "Step %d skipped its update: its loss or its gradient is not finite.", step
            )
        self.throughput.step()
        self._add({"skipped_records": np.asarray(skipped, np.float64)})
        if in_a_row == 0:  # skipped updates would make the means of the line NaN
            self._add(values | {"steps": np.ones(())})
        noise = float(values["max_t"]) if "max_t" in values else None
        if step % self.train.log_every == 0 or step == self.train.steps:
            line = self._line(step, values)
            self.writer.write(step, line)
            self.progress.update(
                step, loss=line.get("loss", np.nan), images_per_s=line["images_per_s"], noise=noise
            )
            self.window = {}
        else:
            self.progress.update(step)

    def totals(self) -> dict[str, float]:
        """Return medians over the lines of this process, seconds of compilation, and goodput."""
        keys = {key for line in self.rates for key in line if key != "compile_s"}
        medians = {k: float(np.median([line[k] for line in self.rates])) for k in sorted(keys)}
        compile_s = sum((line.get("compile_s", 0.0) for line in self.rates), 0.0)
        return medians | {"compile_s": compile_s} | self.goodput.totals()

    def _add(self, values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            self.window[name] = self.window.get(name, 0.0) + value

    def _line(self, step: int, last: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return means over the window's updates, sums over counts, and total counts."""
        window = dict(self.window)
        steps = float(window.pop("steps", 0.0))
        line: dict[str, Any] = {
            "skipped_records": sum_over_hosts(int(window.pop("skipped_records"))),
            "left_out_records": len(self.account.left_out.rejects),
        }
        line["skipped_updates"] = int(last["nonfinite"])
        window.pop("nonfinite", None)
        line |= {name: mean.tolist() for name, mean in means(window, steps).items()}
        # The optimizer does not count skipped updates.
        line["learning_rate"] = float(self.learning_rate(step - 1 - line["skipped_updates"]))
        self.rates.append(self.throughput.rates())
        self.goodput.add({"step": step, **self.rates[-1]})
        return line | self.rates[-1]
