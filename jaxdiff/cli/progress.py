"""Progress of commands: a live line on a terminal, and nothing where there is none."""

import contextlib
from collections.abc import Callable, Iterator

import jax
from rich import progress as rich_progress
from rich.console import Console

from jaxdiff.distributed.multihost import is_host0
from jaxdiff.io.terminal import console, printable

# JAX reports the first before it compiles a program, and the second after that.
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def show_progress(
    what: str, total: int | None = None, *, quiet: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show what is being done, for how long, and whether JAX is compiling for it.

    The line is on standard error, and vanishes at the end. Nothing is shown if that is no terminal,
    nor by hosts other than the first. Print nothing within the context.

    Args:
      what: such as "Loading runs/x".
      total: images to come; None shows no count.
      quiet: show nothing.

    Yields:
      A function to call with the number of images that have been added.
    """
    line = console(stderr=True)
    columns = [
        rich_progress.SpinnerColumn(),
        rich_progress.TextColumn("{task.description}{task.fields[phase]}", markup=False),
        rich_progress.TimeElapsedColumn(),
    ]
    if total is not None:
        columns[2:2] = [rich_progress.BarColumn(bar_width=20), rich_progress.MofNCompleteColumn()]
    live = rich_progress.Progress(
        *columns,
        console=line,
        transient=True,
        # Results go where standard output goes, which may be a file.
        redirect_stdout=False,
        redirect_stderr=False,
        disable=quiet or not line.is_terminal or not is_host0(),
    )
    task = live.add_task(printable(what), total=total, phase="")

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in (_LOWERED, _COMPILED):
            live.update(task, phase=" (compiling)" if event == _LOWERED else "")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with live:
            yield lambda count: live.advance(task, count)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def line_console(*, quiet: bool, verbose: bool) -> Console:
    """Return a console for standard error; it writes to a file if `verbose`, and never if quiet."""
    line = console(stderr=True)
    line.quiet = quiet or not (line.is_terminal or verbose)
    return line
