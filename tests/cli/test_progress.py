"""Progress on a terminal."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jaxdiff.cli import progress
from jaxdiff.cli.progress import line_console, show_progress


@pytest.fixture
def written(monkeypatch):
    """`written(True)` makes standard error a terminal, and returns what is written to it."""

    def start(terminal):
        out = io.StringIO()

        def console(stderr):
            assert stderr
            return Console(file=out, force_terminal=terminal, width=100)

        monkeypatch.setattr(progress, "console", console)
        return out

    return start


def work():
    with show_progress("Sampling", 4) as advance:
        advance(3)


def test_a_terminal_shows_what_is_done_and_how_far(written):
    out = written(True)
    work()
    assert "Sampling" in out.getvalue()
    assert "3/4" in out.getvalue()


def test_compiling_is_shown(written, monkeypatch):
    out, phases = written(True), []
    update = progress.rich_progress.Progress.update

    def record(self, task, **changes):
        phases.append(changes.get("phase"))
        update(self, task, **changes)

    monkeypatch.setattr(progress.rich_progress.Progress, "update", record)
    with show_progress("Sampling"):
        jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.ones(7))
    assert phases[-2:] == [" (compiling)", ""]
    assert "Sampling" in out.getvalue()
    jax.jit(lambda x: jnp.cos(x) * 3.25)(jnp.ones(7))  # after the context nothing listens
    assert phases.count("") == phases.count(" (compiling)")


@pytest.mark.parametrize("why", ["a file", "quiet", "another host"])
def test_nothing_is_shown(written, monkeypatch, why):
    out = written(why != "a file")
    if why == "another host":
        monkeypatch.setattr(progress, "is_host0", lambda: False)
    with show_progress("Sampling", 4, quiet=why == "quiet") as advance:
        advance(4)
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("terminal", "quiet", "verbose", "writes"),
    [
        (True, False, False, True),
        (False, False, False, False),
        (False, False, True, True),
        (True, True, False, False),
    ],
)
def test_lines_go_to_a_file_only_if_asked_for(written, terminal, quiet, verbose, writes):
    out = written(terminal)
    line_console(quiet=quiet, verbose=verbose).print("image 1/4")
    assert bool(out.getvalue()) == writes
