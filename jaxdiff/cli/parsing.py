"""Words of the command line as dataclasses: flags, recipes, and mistakes told in one sentence."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import typing
from pathlib import Path
from typing import Any

import tyro

from jaxdiff.config.serialization import members
from jaxdiff.errors import UserError
from jaxdiff.training.recipe import Config, load_recipe

DEFAULT_RECIPE = Path(__file__).parent.parent.parent / "configs" / "produce.py"
NO_PREFIX = tyro.conf.arg(name="")  # --train.steps rather than --config.train.steps


def parse(target: Any, arguments: list[str], *, prog: str, default: Any = None) -> Any:
    """Parses flags into a dataclass or the arguments of a function, through tyro.

    Raises:
      UserError: for a value that cannot be read or is missing; for a flag that there is not, with
        the nearest that there is.
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
            raise UserError(f"{_sentence(box.getvalue())} See {prog} --help.") from None
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"{prog} has no place for {flag!r}: see {prog} --help.")
        known = sorted(_flags(target if default is None else default))
        nearest = _nearest(flag.replace("_", "-"), known)
        hint = f"did you mean {nearest}?" if nearest else f"see {prog} --help."
        raise UserError(f"{prog} does not know {flag}: {hint}")
    return value


def _nearest(flag: str, known: list[str]) -> str | None:
    """The flag that is meant: one with a slip, one that ends so, or one that is at all like it."""
    slip = difflib.get_close_matches(flag, known, n=1, cutoff=0.8)
    ending = [name for name in known if name.endswith(flag.removeprefix("-"))]
    like = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    return next(iter(slip + ending + like), None)


def _sentence(box: str) -> str:
    """A framed message of tyro's, what stands between its title and its next rule, as one line."""
    lines = (line.strip("│| ") for line in box.splitlines()[1:])
    parts = itertools.groupby(lines, key=lambda line: bool(line.strip("─-╰╯+ ")))
    told = next((" ".join(part) for is_text, part in parts if is_text), box)
    return f"{told[:1].upper()}{told[1:].rstrip('.')}."


def _flags(options: Any, prefix: str = "") -> list[str]:
    """All flags, as `--train.batch-size`, of a dataclass, and of a nested one by its default."""
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
        elif tyro.conf.Positional not in marks and not _is_part(hints[f.name]):
            flags.append(f"--{prefix}{f.name}".replace("_", "-"))
    return flags


def _is_part(hint: Any) -> bool:
    """Whether a field holds a dataclass, whose keys are flags, while it has none of its own."""
    return any(dataclasses.is_dataclass(c) for c in members(hint))


def read_recipe(arguments: list[str]) -> tuple[Config, list[str]]:
    """The recipe whose file comes first, or the default one, and the arguments after it."""
    if arguments and not arguments[0].startswith("-"):
        return load_recipe(arguments[0]), arguments[1:]
    return load_recipe(DEFAULT_RECIPE), arguments
