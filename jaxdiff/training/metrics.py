"""Metrics of a run: records on disk, a progress line, and throughput."""

import math
import pathlib
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, Any, Literal

import jax
import numpy as np
from etils import epath
from rich import progress as rich_progress
from rich.console import Console

from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Report
from jaxdiff.io.files import is_local, write_whole
from jaxdiff.io.terminal import console as terminal_console
from jaxdiff.io.text import format_json, parse_json, read_text

RECORDS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id.txt"

UPLOAD_SECONDS = 60.0  # between uploads of the records to cloud storage, which cannot append

Metrics = Mapping[str, Any]
"""Name to a number or a list of numbers: Python's, NumPy's or JAX's on the host."""


class MetricsWriter:
    """Write metrics to `metrics.jsonl`, TensorBoard and optionally Weights & Biases.

    Images of evaluators go to TensorBoard and Weights & Biases.

    A line of `metrics.jsonl` is one JSON object with `step` and the metrics of that step. Only
    process 0 of a multi-host run writes; in other processes every method does nothing.

    Args:
      folder: of the run, local or in cloud storage; created if missing.
      resume_from: steps taken so far. Records of later steps, written between the last checkpoint
        and the interruption, are dropped, and so is a truncated last line.
      wandb: also log to Weights & Biases, which reads its settings (project, key, mode) from the
        environment. A resumed run continues under the id stored in the folder.
      config: of the run, shown by Weights & Biases.

    Attributes:
      earlier: the records that a resumed run keeps, in order; on process 0 alone.

    Raises:
      UserError: the package `wandb`, or one that TensorBoard needs for this storage, is missing.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        resume_from: int = 0,
        wandb: bool = False,
        config: dict[str, Any] | None = None,
    ):
        self._active = jax.process_index() == 0
        self.earlier: list[dict[str, Any]] = []
        if not self._active:
            return
        self._folder = epath.Path(folder)
        self._remote = not is_local(self._folder)
        self._wandb = self._start_wandb(resume_from, config) if wandb else None
        self._folder.mkdir(parents=True, exist_ok=True)
        from jaxdiff.training.tensorboard import TensorBoard  # not where metrics are only read

        try:
            self._board = TensorBoard(str(self._folder / TENSORBOARD), resume_from + 1)
        except ImportError as error:
            raise UserError(
                f"TensorBoard cannot write to {folder}: {error}; install the package, or give a "
                "local folder."
            ) from error
        kept = _records_until(resume_from, self._folder / RECORDS)
        self.earlier, self._lines = [record for record, _ in kept], [line for _, line in kept]
        self._upload()
        self._file: IO[str] | None = None
        if not self._remote:
            self._lines.clear()
            path = pathlib.Path(self._folder, RECORDS)
            self._file = path.open("a", buffering=1)

    def _start_wandb(self, resume_from: int, config: dict[str, Any] | None):
        try:
            import wandb
        except ImportError:
            raise UserError(
                "Weights & Biases needs the package wandb, which is not installed: run "
                "pip install -e '.[wandb]' in a clone of jaxdiff."
            ) from None
        known = self._folder / WANDB_ID
        same = resume_from and known.exists()
        try:
            run = wandb.init(
                id=read_text(known).strip() if same else None,
                resume="allow",
                name=self._folder.name,
                dir=None if self._remote else str(self._folder),
                config=config,
            )
        except wandb.Error as error:  # such as no key, no network, or an unknown project
            said = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"Weights & Biases did not start: {said}: expected a key of `wandb "
                "login`, or WANDB_MODE=offline; correct it, or train without --train.wandb."
            ) from None
        if not same:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(known, run.id.encode())
        return run

    def _upload(self) -> None:
        """Atomically replace the records on disk by those in memory."""
        text = "".join(f"{line}\n" for line in self._lines)
        write_whole(self._folder / RECORDS, text.encode())
        self._uploaded_at = time.monotonic()

    def write(self, step: int, metrics: Metrics) -> None:
        """Append one record.

        A value that is not finite is null in `metrics.jsonl` and omitted elsewhere. A list, such as
        the loss by noise level, stays a list in `metrics.jsonl`; elsewhere each element is a scalar
        `name/0`, `name/1` and so on.
        """
        if not self._active:
            return
        record = {"step": step} | {name: np.asarray(x).tolist() for name, x in metrics.items()}
        line = format_json(record)
        if self._file is not None:
            self._file.write(f"{line}\n")
        else:
            self._lines.append(line)
            if time.monotonic() - self._uploaded_at >= UPLOAD_SECONDS:
                self._upload()
        scalars = {name: x for name, x in _scalars(metrics) if math.isfinite(x)}
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def write_report(self, step: int, report: Report) -> None:
        """Append the scalars and the images of evaluators, if there are any."""
        if report.scalars:
            self.write(step, report.scalars)
        if not self._active or not report.images:
            return
        for name, image in report.images.items():
            self._board.add_image(name, image, step)
        if self._wandb is not None:
            import wandb

            images = {name: wandb.Image(image) for name, image in report.images.items()}
            self._wandb.log(images, step=step)

    def close(self) -> None:
        """Write what is still in memory, and close the files."""
        if not self._active:
            return
        if self._file is not None:
            self._file.close()
        else:
            self._upload()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _records_until(step: int, path: epath.Path) -> list[tuple[dict[str, Any], str]]:
    """Return the records up to a step and their lines, without a truncated one."""
    kept = []
    data = path.read_bytes() if path.exists() else b""
    for line in data.split(b"\n"):
        try:
            record = parse_json(line, path)
            if record["step"] <= step:
                kept.append((record, line.decode()))
        except (UserError, LookupError, TypeError):  # truncated, or of another program
            continue
    return kept


def _scalars(metrics: Metrics) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        values = np.asarray(value, np.float64)
        if values.ndim:
            yield from ((f"{name}/{i}", float(v)) for i, v in enumerate(values))
        else:
            yield name, float(values)


_Phase = Literal["compile", "data", "device", "pause"]


class Throughput:
    """Images per second, what the time of a step is spent on, and model FLOP utilisation.

    The loop marks its phases; the time of "compile" and "pause" is excluded from the rates:

        with throughput.timed("compile"):  # around the first call of the step, or its compilation
        with throughput.timed("data"):     # around the fetch of a batch
        with throughput.timed("device"):   # around waiting for the results of a step
        with throughput.timed("pause"):    # around anything but training, such as sampling images
        throughput.step()                  # when the results of a step have arrived

    Args:
      batch_size: images in a step, over all devices.
      flops_per_image: model FLOPs of a training step; None reports no utilisation.
      peak_flops: FLOP/s of all devices together; None reports no utilisation.
      clock: time in seconds.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        flops_per_image: float | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._batch_size = batch_size
        self._utilisation = flops_per_image / peak_flops if flops_per_image and peak_flops else None
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        self._start = self._clock()
        self._steps = 0
        self._spent: dict[_Phase, float] = dict.fromkeys(typing.get_args(_Phase), 0.0)

    @contextmanager
    def timed(self, phase: _Phase) -> Iterator[None]:
        """Measure the time of a context as that of a phase."""
        start = self._clock()
        try:
            yield
        finally:
            self._spent[phase] += self._clock() - start

    def step(self) -> None:
        """Count one finished step."""
        self._steps += 1

    def rates(self) -> dict[str, float]:
        """Return the rates since the last call, and start a new window.

        They are `images_per_s`; `step_s` in seconds and its fractions, in [0, 1]: `data_wait`,
        `device_wait` and, the rest, `host`; `mfu` in [0, 1], if FLOPs and peak are known; and
        `compile_s` in seconds, if anything was compiled.

        The host dispatches a step while the device computes the last one, then waits for the
        results of the last. A run that the device limits has a `device_wait` near 1.
        """
        spent = self._spent
        seconds = self._clock() - self._start - spent["compile"] - spent["pause"]
        seconds = max(seconds, 1e-9)  # an empty window has no steps
        rate = self._steps * self._batch_size / seconds
        data = min(spent["data"] / seconds, 1.0)
        device = min(spent["device"] / seconds, 1.0 - data)
        rates = {"images_per_s": rate, "step_s": seconds / max(self._steps, 1)}
        rates |= {"data_wait": data, "device_wait": device, "host": 1.0 - data - device}
        if self._utilisation is not None:
            rates["mfu"] = rate * self._utilisation
        if spent["compile"]:
            rates["compile_s"] = spent["compile"]
        self._reset()
        return rates


class Progress:
    """Step, loss, images/s and time left: a live line on a terminal, occasional lines in a log.

    A context manager. Only process 0 shows anything. An update costs microseconds: another thread
    refreshes the terminal a few times a second. The time left follows from the last 1000 updates,
    the first excluded, which waited for the compilation.

    Args:
      total: steps of the whole run.
      start: steps taken before.
      unit: name of what is counted.
      every: seconds between lines where there is no terminal; the last step always has one.
      console: where to write; standard output by default.
      clock: monotonic time in seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        unit: str = "step",
        every: float = 15.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._every, self._clock = every, clock
        self._console = console or terminal_console()
        self._active = jax.process_index() == 0
        self._printed_at = -math.inf
        self._shown: dict[str, str] = {}
        self._bar = rich_progress.Progress(
            rich_progress.BarColumn(bar_width=20),
            rich_progress.TextColumn(
                "{task.description} {task.completed}/{task.total}", markup=False
            ),
            rich_progress.TextColumn("{task.fields[shown]}", markup=False),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("left"),
            console=self._console,
            get_time=clock,
            refresh_per_second=4,
            speed_estimate_period=math.inf,
        )
        self._bar.add_task(unit, total=total, completed=start, shown="")

    def __enter__(self) -> "Progress":
        if self._active and self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        images_per_s: float | None = None,
        noise: float | None = None,
    ) -> None:
        """Show that `step` steps have been taken; values that are None stay as last shown.

        `noise` is the highest noise level of the curriculum's current stage, in [0, 1].
        """
        if not self._active:
            return
        if loss is not None:
            self._shown["loss"] = f"loss {loss:.4g}"
        if images_per_s is not None:
            self._shown["rate"] = f"{images_per_s:,.1f} images/s"
        if noise is not None:
            self._shown["noise"] = f"noise <= {noise:.0%}"
        shown = [self._shown[name] for name in ("loss", "rate", "noise") if name in self._shown]
        (task,) = self._bar.tasks
        self._bar.update(task.id, completed=step, shown="  ".join(shown))
        now = self._clock()
        due = task.finished or now - self._printed_at >= self._every
        if self._console.is_terminal or not due:
            return
        self._printed_at = now
        line = [f"{task.description} {task.completed}/{task.total}", *shown]
        if task.time_remaining is not None:
            line.append(f"{timedelta(seconds=task.time_remaining)} left")
        self._console.print("  ".join(line), highlight=False, markup=False, soft_wrap=True)
