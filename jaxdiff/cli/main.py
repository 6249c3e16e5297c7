"""The `jaxdiff` command: dispatch to one module per command.

Only the module of the command that runs is imported, so that `jaxdiff --help` starts neither JAX
nor a model.
"""

import contextlib
import difflib
import gc
import importlib
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any

from jaxdiff import __version__
from jaxdiff.config.plugins import import_plugins
from jaxdiff.config.serialization import accept_types
from jaxdiff.distributed.compilation_cache import use_compilation_cache
from jaxdiff.errors import Stopped, UserError
from jaxdiff.io import files
from jaxdiff.io.terminal import unfailing_output, write_line, write_text

COMMANDS = {
    "train": "Train a recipe; the same command resumes an interrupted run.",
    "sample": "Generate images from prompts, on the command line or in a file.",
    "evaluate": "Score a trained model.",
    "ema": "Average a run's weights with a width chosen after training.",
    "export": "Write a trained model as one folder, for jaxdiff or diffusers.",
    "prepare": "Convert images with captions, or their latents, to shards.",
    "explore": "Map a data set in the spaces of CLIP and an autoencoder.",
    "compile": "Compile a model's sampler ahead of time, also for a TPU slice.",
    "plan": "Compile a recipe for a TPU slice or GPUs; print memory and time.",
    "bench": "Measure training, sampling, data loading or checkpoints.",
    "recipes": "List the recipes with their purpose, hardware and cost.",
    "env": "Print versions, devices and settings for a bug report.",
    "completion": "Print a completion script for bash, zsh or fish.",
}
"""What each command does. `NAME_command` of the module `jaxdiff.cli.NAME` runs it."""

WRITE_FILES = {"train", "sample", "evaluate", "ema", "export", "prepare", "explore"}
"""Commands whose work is files, which lost output leaves whole."""

CACHED = {"train", "sample", "evaluate", "ema", "prepare", "explore"}
"""Commands that keep their compiled programs; others measure compilation, or compile nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command with `arguments`, by default those of the process.

    Returns the exit status: 0; 1 for partial failure; 2 for a user error, which is printed as one
    sentence to standard error; 128 and its number after a signal. Output that cannot be written
    does not end a command: the status is that of its work, but 1 where the output was all of it and
    its reader did not close it.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with unfailing_output() as output, _stop_on_signals() as received:
        status = _run(words, received)
        output.flush()
        if output.lost:
            write_line(f"jaxdiff: Lines of standard output were lost: {output.lost}.", stderr=True)
            status = status or int(next(filter(COMMANDS.get, words), "") not in WRITE_FILES)
    return status


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[list[signal.Signals]]:
    """Raise `Stopped` at the first signal that asks to end; a second one ends at once.

    Python drops an exception within a destructor or a callback: the signal is then sent again.

    Yields:
      The signals so far.
    """
    received: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}
    usual = sys.unraisablehook

    def stop(number: int, _frame: object) -> None:
        for other in before:
            signal.signal(other, signal.SIG_DFL)
        received.append(signal.Signals(number))
        raise Stopped(received[-1])

    def dropped(what: Any) -> None:
        if not isinstance(what.exc_value, Stopped):
            usual(what)
            return
        for other in before:
            signal.signal(other, stop)
        threading.Timer(0.05, os.kill, (os.getpid(), what.exc_value.number)).start()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):  # not under nohup
                before[number] = signal.signal(number, stop)
    sys.unraisablehook = dropped
    try:
        yield received
    finally:
        sys.unraisablehook = usual
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(arguments: list[str], received: list[signal.Signals]) -> int:
    """Run one command; return the exit status."""
    try:
        _dispatch(arguments)
        return 0
    except SystemExit as end:  # raised by tyro after --help, and by commands for status 1
        return int(end.code or 0)
    except BaseException as error:
        # A library that a signal interrupts may raise an error of its own.
        if received or isinstance(error, KeyboardInterrupt):
            line = Stopped(*received[:1])
            status = 128 + line.number
        elif (refusal := _refusal(error)) is not None:
            line, status = refusal, 2
        else:
            raise
    write_line(f"jaxdiff: {line}", stderr=True)
    return status


def _refusal(error: BaseException) -> UserError | None:
    """Return the sentence for an error of the user's, or None for one of ours."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return files.file_error(error)
    if isinstance(error, RuntimeError | AssertionError):
        return _platform_error()
    return None


def _platform_error() -> UserError | None:
    """Return the refusal of JAX_PLATFORMS where JAX cannot start a platform that it names."""
    jax, names = sys.modules.get("jax"), os.environ.get("JAX_PLATFORMS")
    if not names or jax is None:
        return None
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where a plugin is not installed
        said = str(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        return UserError(
            f"JAX_PLATFORMS is {names!r}: {said or 'JAX finds no such device'}: expected platforms "
            "of this machine, such as cpu; correct or unset it."
        )
    return None


def _dispatch(arguments: list[str]) -> None:
    words, plugins = _split_plugins(arguments)
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help"):
        write_text(_usage())
    elif name == "--version":
        write_line(f"jaxdiff {__version__}")
    elif name in COMMANDS:
        _check_remote_paths(rest)
        command = getattr(_import(f"jaxdiff.cli.{name}"), f"{name}_command")
        if name in CACHED:
            use_compilation_cache()
        with accept_types(import_plugins(plugins)):
            command(rest)
    else:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(COMMANDS)}."
        raise UserError(f"There is no command {name!r}: {hint}")


def _import(module: str) -> types.ModuleType:
    """Import a module; what it makes stays, and is not searched for garbage (0.3 s)."""
    if module in sys.modules:
        return sys.modules[module]
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def _split_plugins(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without `--plugin MODULE`, which all commands take, and the modules."""
    words, modules, rest = [], [], iter(arguments)
    for word in rest:
        if word == "--":  # the rest are prompts or paths
            return [*words, word, *rest], modules
        flag, equals, module = word.partition("=")
        if flag != "--plugin":
            words.append(word)
            continue
        module = module if equals else next(rest, "")
        if not module or module.startswith("-"):
            raise UserError("--plugin has no value: expected the name of a Python module.")
        modules.append(module)
    return words, modules


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jaxdiff COMMAND ...",
            "",
            "Text-to-image diffusion in JAX.",
            "",
            *lines,
            "",
            "All commands take --plugin MODULE, a Python module with types of your models.",
            "jaxdiff COMMAND --help lists a command's options, jaxdiff --version the version.",
        ]
    )


def _check_remote_paths(arguments: list[str]) -> None:
    """Check that buckets among the arguments can be reached before a command does any work.

    A word with spaces is a prompt.
    """
    paths = [word.rpartition("=")[2] for word in arguments]
    remote = [path for path in paths if "://" in path and path.split() == [path]]
    for path in remote:
        files.check_reachable(path)


if __name__ == "__main__":
    sys.exit(main())
