"""Parse command lines into dataclasses, and report mistakes in one sentence."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import typing
from typing import Any

import tyro

from jaxdiff.cli.peer_flags import peer_flag
from jaxdiff.config.serialization import members
from jaxdiff.errors import FieldError, UserError

NO_PREFIX = tyro.conf.arg(name="")  # --train.steps rather than --config.train.steps


def parse_flags(target: Any, arguments: list[str], *, prog: str, default: Any = None) -> Any:
    """Parse flags into a dataclass or the arguments of a function, with tyro.

    `prog` is the command, such as `jaxdiff train`; flags change the instance `default`.

    Raises:
      UserError: a value is missing or invalid, or a flag is unknown; the message names the flag
        that was probably meant.
    """
    options = {} if default is None else {"default": default}
    with contextlib.redirect_stderr(io.StringIO()) as box:
        try:
            value, unknown = tyro.cli(
                target,
                args=arguments,
                prog=prog,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
                **options,
            )
        except SystemExit as end:
            if not end.code:
                raise
            raise UserError(_message(_sentence(box.getvalue()), prog)) from None
        except FieldError as error:
            raise _called_by_flag(error, arguments) from None
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"{prog} got an unexpected argument {flag!r}: see {prog} --help.")
        raise UserError(f"{prog} does not know {flag}: {_hint(flag, target, default, prog)}")
    return value


def _called_by_flag(error: FieldError, arguments: list[str]) -> UserError:
    """Return the error under the name of the flag that sets the field, if only one can."""
    flags = {word.split("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    field = error.field.replace("_", "-")
    named = [name for name in flags if re.split(r"--|\.", name)[-1] == field]
    return error.called(named[0]) if len(named) == 1 else error


def _hint(flag: str, target: Any, default: Any, prog: str) -> str:
    """Return a hint for an unknown flag."""
    peer = peer_flag(prog, flag)
    if peer is not None:
        return f"it is {peer} here."
    known = sorted([*_flags(target if default is None else default), "--plugin"])
    nearest = _nearest(flag.replace("_", "-"), known)
    return f"did you mean {nearest}?" if nearest else f"see {prog} --help."


def _nearest(flag: str, known: list[str]) -> str | None:
    """Return the most similar flag: a typo, else one with this ending, else a distant one."""
    typo = difflib.get_close_matches(flag, known, n=1, cutoff=0.8)
    ending = [name for name in known if name.endswith(flag.removeprefix("-"))]
    like = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    return next(iter(typo + ending + like), None)


_NO_NUMBER = (
    re.compile(
        r"Error parsing (?P<flag>\S+): no type .*(?P<kind>INT|FLOAT) .*\[(?P<value>'.*')\]\."
    ),
    re.compile(
        r"Error parsing (?P<flag>\S+): invalid literal for (?P<kind>int).*: (?P<value>'.*')\."
    ),
    re.compile(r"Error parsing (?P<flag>\S+): could .* to (?P<kind>float): (?P<value>'.*')\."),
)
_NO_CHOICE = re.compile(
    r"Invalid choice (?P<value>'.*') for argument '(?P<flag>\S+)'\. "
    r"Expected one of \((?P<choices>.*)\)\."
)
_NO_VALUE = re.compile(r"Missing value for argument '(?P<flag>\S+)'\..*")
_KINDS = {"int": "a whole number", "float": "a number"}


def _message(text: str, prog: str) -> str:
    """Return tyro's message, in this package's words where it is about the value of a flag."""
    if found := _NO_VALUE.fullmatch(text):
        return f"{found['flag']} has no value: expected one; see {prog} --help."
    if found := _NO_CHOICE.fullmatch(text):
        choices = sorted(set(re.findall(r"'(.*?)'", found["choices"])) - {"None"})
        return f"{found['flag']} is {found['value']}: expected one of {', '.join(choices)}."
    for pattern in _NO_NUMBER:
        if found := pattern.fullmatch(text):
            kind = _KINDS[found["kind"].lower()]
            return f"{found['flag']} is {found['value']}: expected {kind}."
    return f"{text} See {prog} --help."


def _sentence(box: str) -> str:
    """Return the text of tyro's framed message as one line."""
    lines = (line.strip("│| ") for line in box.splitlines()[1:])
    parts = itertools.groupby(lines, key=lambda line: bool(line.strip("─-╰╯+ ")))
    text = next((" ".join(part) for is_text, part in parts if is_text), box)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _flags(options: Any, prefix: str = "") -> list[str]:
    """Return all flags of a dataclass and of nested ones, such as `--train.batch-size`."""
    hints = typing.get_type_hints(
        options if isinstance(options, type) else type(options), include_extras=True
    )
    flags = []
    for f in dataclasses.fields(options):
        marks = typing.get_args(hints[f.name])[1:]
        value = getattr(options, f.name, None)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            own = "" if NO_PREFIX in marks else f"{f.name}."
            flags += _flags(value, prefix + own)
        elif tyro.conf.Positional not in marks and not any(
            dataclasses.is_dataclass(c) for c in members(hints[f.name])
        ):
            flags.append(f"--{prefix}{f.name}".replace("_", "-"))
    return flags
