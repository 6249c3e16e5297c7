"""Traces of what devices and host do, for xprof, TensorBoard's profiler and Perfetto."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
from etils import epath

from jaxdiff.io.files import is_local, make_folder, write_whole

TRACE = "trace"


@contextmanager
def traced(folder: epath.PathLike) -> Iterator[None]:
    """Trace what runs in the context on this host and its devices.

    The host's Python functions are left out: tracing them would slow the steps that are traced.

    Args:
      folder: where `plugins/profile/TIME/` is written, local or in cloud storage.

    Raises:
      UserError: the folder is not writable.
    """
    folder = make_folder(folder)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    local = is_local(folder)
    with nullcontext(str(folder)) if local else tempfile.TemporaryDirectory() as written:
        with jax.profiler.trace(written, profiler_options=options):
            yield
        for path in [] if local else Path(written).rglob("*.*"):
            write_whole(folder / str(path.relative_to(written)), path.read_bytes())


class StepTrace:
    """A trace of consecutive steps of a run, in `trace/` in its folder. A context manager.

    Args:
      folder: of the run.
      first: number of the first step that is traced; None traces none.
      steps: number of steps that are traced.
      log: called with the path of the trace.
    """

    def __init__(
        self, folder: epath.Path, *, first: int | None, steps: int, log: Callable[[str], None]
    ):
        self._path, self._log = folder / TRACE, log
        self._begin, self._end = (None, None) if first is None else (first, first + steps)
        self._running = ExitStack()

    def before(self, step: int, state: Any) -> None:
        """Begin or end the trace if it is due before this step; `state` is that of the last."""
        if step not in (self._begin, self._end):
            return
        jax.block_until_ready(state)  # the trace has whole steps
        self._running.close()
        if step == self._begin:
            self._begin = None
            self._running.callback(self._log, f"Trace: {self._path}")
            self._running.enter_context(traced(self._path))

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self._running.close()
        if self._begin is not None and kind is None:
            self._log(f"No trace: this run did not take step {self._begin} (train.profile_at).")
