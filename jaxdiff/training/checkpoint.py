"""Checkpoints of a run: written in the background, and verified byte by byte before a restore.

Orbax writes and reads the arrays; `checkpoint_folder` defines the layout on disk.
"""

import contextlib
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType

import jax
from etils import epath
from jaxtyping import PyTree

from jaxdiff.distributed.distributed_init import is_host_lost
from jaxdiff.errors import UserError
from jaxdiff.io.text import read_json, read_text
from jaxdiff.pretrained import checkpoint_folder
from jaxdiff.training.state import TrainState

# Fields that Orbax stores together as "training"; params and ema can be read without them.
TRAINING = ("step", "key", "opt_state", "task_state", "nonfinite")
AVERAGES = "averages"  # the part of averages for post-hoc EMA, where a run tracks some
# Devices that hold the same array write a slice of it each. Each slice compiles a program per shape
# and device, which would delay the first save for small arrays.
_MIN_SLICE = 2**22  # bytes
DISK_FULL = re.compile("No space left|Disk quota exceeded")


class Checkpoints:
    """Save and restore the checkpoints of one run, and keep the newest `keep`; None keeps all.

    Every process of a multi-host run creates one and makes the same calls. `folder` may be local or
    `gs://`, and is created on demand. `report` receives one sentence for each damaged checkpoint
    that is skipped.

    Raises:
      UserError: `keep` is below 1.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep: int | None = 3,
        report: checkpoint_folder.Report | None = None,
    ):
        if keep is not None and keep < 1:
            raise UserError(f"{keep} checkpoints cannot be kept: expected at least 1.")
        self._folder = checkpoint_folder.absolute(folder)
        self._keep = keep
        self._report = report or logging.getLogger(__name__).warning
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._newest: int | None = None  # step known to be complete on disk
        logging.getLogger("absl").addFilter(_not_orbax_traceback)
        _ignore_closed_loop()

    def save(self, state: TrainState, notes: Mapping[str, str] = MappingProxyType({})) -> None:
        """Start to save `state`, after the previous save has finished; raise the error of that.

        Returns once all arrays are on the host, so that `state` may be donated. Does nothing if the
        step was the last one saved or restored. `notes` are further files of text, by name.
        """
        self.save_parts(int(state.step), _parts(state), notes)

    def save_parts(
        self,
        step: int,
        parts: dict[str, PyTree],
        notes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Start to save trees of arrays by their name, as `save` does a state."""
        self.wait()
        from orbax.checkpoint import v1 as ocp

        if step == self._newest:
            return
        files = {
            checkpoint_folder.ARRAYS: json.dumps(checkpoint_folder.describe(parts), indent=0)
        } | dict(notes)
        try:
            if jax.process_index() == 0:
                checkpoint_folder.clean(self._folder)
            context = ocp.Context()
            context.array.saving.min_slice_bytes_for_replica_parallel = _MIN_SLICE
            with context:
                writing = ocp.save_checkpointables_async(
                    checkpoint_folder.unfinished(self._folder, step), parts, overwrite=True
                )
        except (OSError, ValueError) as error:
            self._fail(step, error)
        else:
            self._pending = self._thread.submit(self._finish, writing.result, step, files)

    def wait(self) -> None:
        """Wait until the save is on disk.

        Raises:
          UserError: it could not be written, as on a full disk; earlier checkpoints remain.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, unverified and ascending."""
        return checkpoint_folder.steps(self._folder)

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, unverified; None if there is none."""
        return max(self.steps(), default=None)

    def restore(self, abstract: TrainState) -> TrainState | None:
        """Restore the newest undamaged checkpoint; return None if the folder has no checkpoint.

        Args:
          abstract: a `jax.ShapeDtypeStruct` per array. Each device reads its part of the struct's
            sharding, on any mesh; without a sharding the first device reads everything.

        Raises:
          UserError: all checkpoints are damaged, or the arrays are not those of `abstract`.
        """
        self.wait()
        step = checkpoint_folder.latest_valid_step(self._folder, self._report)
        if step is None:
            return None
        from orbax.checkpoint import v1 as ocp

        path, parts = self._folder / str(step), _parts(abstract)
        _check_fit(path, parts)
        loaded = ocp.load_checkpointables(path, checkpoint_folder.placed(parts))
        self._newest = step
        averages = loaded.get(AVERAGES, {})
        return TrainState(
            params=loaded["params"], ema=loaded["ema"], averages=averages, **loaded["training"]
        )

    def note(self, name: str) -> str | None:
        """Return a note of the checkpoint that was restored; None if there is none."""
        path = self._folder / str(self._newest) / name
        return read_text(path) if self._newest is not None and path.exists() else None

    def close(self) -> None:
        """Wait as `wait` does, and end the writing thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        if is_host_lost(exception):
            return  # the save would wait for the lost host
        try:
            self.close()
        except UserError as error:
            if exception is None:
                raise
            self._report(str(error))  # the exception that ended the block takes precedence

    def _finish(self, written: Callable[[], None], step: int, files: dict[str, str]) -> None:
        """Complete a save, in the background, once `written` returns."""
        try:
            written()
            if jax.process_index() == 0:
                checkpoint_folder.complete(self._folder, step, files)
        except (OSError, ValueError) as error:
            self._fail(step, error)
        self._newest = step
        if jax.process_index() == 0 and self._keep is not None:
            self._remove_old(step, self._keep)

    def _remove_old(self, step: int, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints up to `step`."""
        # Newer steps are damaged: the run has resumed before them.
        steps = [old for old in self.steps() if old <= step]
        try:
            for old in steps[:-keep]:
                checkpoint_folder.remove_checkpoint(self._folder / str(old))
        except OSError as error:  # no reason to end a run
            self._report(f"The checkpoint of step {old} could not be removed: {error}.")

    def _fail(self, step: int, error: Exception) -> None:
        """Remove what was written and raise `error`, as a `UserError` if writing failed."""
        if is_host_lost(error):
            raise error
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # the next save tries again
                checkpoint_folder.clean(self._folder)
        # The C++ code that writes arrays raises ValueError with a status code in front.
        if not isinstance(error, OSError) and not re.match("[A-Z_]+: ", str(error)):
            raise error
        full = "the disk is full" if DISK_FULL.search(str(error)) else str(error)
        latest = self.latest_step()
        kept = "there is none before it" if latest is None else f"that of step {latest} is kept"
        raise UserError(
            f"The checkpoint of step {step} could not be written to {self._folder}: {full}; "
            f"{kept}. Make room or write access there and run the same command again."
        ) from error


def _parts(state: TrainState) -> dict[str, PyTree]:
    """Split a state into the parts that Orbax stores separately."""
    training = {name: getattr(state, name) for name in TRAINING}
    parts = {"params": state.params, "ema": state.ema, "training": training}
    return parts | ({AVERAGES: state.averages} if state.averages else {})


def _check_fit(path: epath.Path, parts: dict[str, PyTree]) -> None:
    """Raise `UserError` unless the arrays saved under `path` are those of `parts`."""
    wanted = checkpoint_folder.describe(parts)
    saved = read_json(path / checkpoint_folder.ARRAYS)
    saved = {name: array for name, array in saved.items() if name.split("/")[0] in parts}
    if differing := sorted(k for k in saved.keys() | wanted if saved.get(k) != wanted.get(k)):
        shown = "; ".join(
            f"{k} is {saved.get(k, 'absent')}, expected {wanted.get(k, 'none')}"
            for k in differing[:3]
        )
        raise UserError(
            f"{path} is a checkpoint of another model: {len(differing)} arrays differ ({shown}). "
            "Use the recipe that it was trained with, or another folder."
        )


def _not_orbax_traceback(record: logging.LogRecord) -> bool:
    """Filter the tracebacks that Orbax logs on a failed write, which is raised anyway."""
    return not (record.exc_info and "orbax" in record.pathname)


def _ignore_closed_loop() -> None:
    """Drop the tracebacks of writes that end after the first failure has closed Orbax's loop."""
    print_error = sys.excepthook

    def hook(kind, error, traceback) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            print_error(kind, error, traceback)

    sys.excepthook = hook
