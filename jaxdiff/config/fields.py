"""Fields of a dataclass that users set, described by the metadata of their annotations.

    strength: Annotated[float | None, Range(0, 1), Doc("Noise added.", "Editing")] = None

From one such line come a command-line flag with its help, a column of a prompt file with its check,
and a value in JSON and back. A constraint has a method `check(name, value, kind)` that takes a
value as JSON has it and returns what the field holds, or raises `UserError`.
"""

import dataclasses
import difflib
import functools
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from etils import epath

from jaxdiff.errors import UserError

LARGEST_FLOAT = float(np.finfo(np.float32).max)
LARGEST_INT = int(np.iinfo(np.int32).max)

LONGEST_TEXT = 2**17
"""Characters of a prompt or another text; image files hold a few of this length."""

_Mark = TypeVar("_Mark")


@dataclass(frozen=True)
class Doc:
    """The help of an option.

    Attributes:
      text: its first sentence stands alone in the short help.
      group: heading in the long help.
      common: whether the short help has it.
      metavar: placeholder of the value; by default that of its constraint.
      alias: a short flag, such as -q.
    """

    text: str
    group: str
    common: bool = False
    metavar: str | None = None
    alias: str | None = None

    @property
    def summary(self) -> str:
        """The first sentence."""
        return re.split(r"(?<=\.) ", self.text, maxsplit=1)[0]


@typing.runtime_checkable
class Constraint(Protocol):
    """What values a field may have."""

    def check(self, name: str, value: Any, kind: Any) -> Any:
        """Return the value to hold; `kind` is the type of the field, `name` what messages say."""
        ...


@dataclass(frozen=True)
class Range:
    """Finite numbers from low to high; in a field of integers, whole ones."""

    low: int | float = -LARGEST_FLOAT
    high: int | float = LARGEST_FLOAT

    def check(self, name: str, value: Any, kind: Any) -> int | float:
        """Raise `UserError` for other types, and outside the range; NaN is in no range."""
        kinds = (int,) if kind is int else (int, float)
        if type(value) not in kinds or not self.low <= value <= self.high:
            what = "a whole number" if kind is int else "a number"
            limits = f" from {_plain(self.low)} to {_plain(self.high)}"
            raise _unexpected(name, value, what + (limits if self.high < LARGEST_FLOAT else ""))
        return kind(value)


@dataclass(frozen=True)
class Choices:
    """One of some texts."""

    values: tuple[str, ...]

    def check(self, name: str, value: Any, kind: Any) -> str:
        """Raise `UserError` for anything else."""
        if value not in self.values:
            raise _unexpected(name, value, f"one of {', '.join(self.values)}")
        return value


@dataclass(frozen=True)
class Text:
    """Text in UTF-8; `number` accepts an integer too, as its digits."""

    empty: bool = False
    number: bool = False

    def check(self, name: str, value: Any, kind: Any) -> Any:
        """Raise `UserError` for other types, and for blank text unless it may be empty."""
        if self.number and type(value) is int:
            return str(value)
        if not isinstance(value, str):
            raise _unexpected(name, value, "a text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name} is not UTF-8: save or type it as UTF-8.") from error
        if "\0" in value:
            raise UserError(f"{name} holds a NUL, which is no text: remove it.")
        if len(value) > LONGEST_TEXT:
            raise UserError(
                f"{name} has {len(value)} characters: expected at most {LONGEST_TEXT}; shorten it."
            )
        if not self.empty and not value.strip():
            raise UserError(f"{name} is empty: expected a text.")
        return value


@dataclass(frozen=True)
class File(Text):
    """The path of a file."""

    def check(self, name: str, value: Any, kind: Any) -> epath.Path:
        """Raise `UserError` for what is no text."""
        return epath.Path(super().check(name, value, str))


@dataclass(frozen=True)
class Switch:
    """True or false."""

    def check(self, name: str, value: Any, kind: Any) -> bool:
        """Raise `UserError` for anything else."""
        if type(value) is not bool:
            raise _unexpected(name, value, "true or false")
        return value


@dataclass(frozen=True)
class Interval:
    """Two numbers in [0, 1], spelled LOW-HIGH."""

    def check(self, name: str, value: Any, kind: Any) -> tuple[float, float]:
        """Raise `UserError` for another spelling or order."""
        number = r"((?:[0-9]+\.)?[0-9]+|\.[0-9]+)"
        match = re.fullmatch(f"{number}-{number}", value) if isinstance(value, str) else None
        low, high = (float(match[1]), float(match[2])) if match else (1.0, 0.0)
        if not 0 <= low <= high <= 1:
            raise _unexpected(name, value, "LOW-HIGH from 0 to 1, such as 0.3-1")
        return low, high


@dataclass(frozen=True)
class Size:
    """Width and height in pixels, spelled WIDTHxHEIGHT, or their ratio, spelled WIDTH:HEIGHT."""

    largest: int

    def check(self, name: str, value: Any, kind: Any) -> tuple[int, int] | str:
        """Raise `UserError` for another spelling or a side that is too long."""
        if isinstance(value, str) and ":" in value:
            return value  # which ratios exist depends on the model
        match = (
            re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", value) if isinstance(value, str) else None
        )
        if not match:
            raise _unexpected(name, value, "WIDTHxHEIGHT, such as 64x64, or a ratio, such as 16:9")
        width, height = int(match[1]), int(match[2])
        if max(width, height) > self.largest:
            raise UserError(f"{name} is {value}: expected at most {self.largest} pixels a side.")
        return width, height


_METAVARS = {Choices: "NAME", File: "FILE", Interval: "LOW-HIGH", Size: "SIZE"}


@dataclass(frozen=True)
class Field:
    """One field, with what its annotation says.

    Attributes:
      name: of the field.
      kind: its type, without None; the first one of a union.
      doc: its help.
      marks: all metadata.
      default: its value where users set none.
    """

    name: str
    kind: Any
    doc: Doc
    marks: tuple[Any, ...]
    default: Any

    def mark(self, kind: type[_Mark]) -> _Mark | None:
        """Return the metadata of a class, if there is any."""
        return next((mark for mark in self.marks if isinstance(mark, kind)), None)

    @property
    def constraint(self) -> Constraint | None:
        """What checks its values."""
        return self.mark(Constraint)  # type: ignore[type-abstract]

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return flag(self.name)

    @property
    def flag_type(self) -> type:
        """How the command line reads it: a number, a switch, or the text that JSON has."""
        return self.kind if self.kind in (int, float, bool) else str

    @property
    def metavar(self) -> str:
        """Placeholder of its value; "" where a flag takes none."""
        if self.doc.metavar is not None:
            return self.doc.metavar
        simple = {int: "INT", float: "FLOAT", bool: ""}.get(self.kind, "TEXT")
        return _METAVARS.get(type(self.constraint), simple)

    def check(self, value: Any, called: str | None = None) -> Any:
        """Return what the field holds of a value of JSON.

        Raises:
          UserError: the value is not allowed.
        """
        constraint = self.constraint
        assert constraint is not None, self.name
        return constraint.check(called or self.name, value, self.kind)

    def from_cell(self, cell: str) -> Any:
        """Return a cell of a table as JSON would have it, or as it is, for `check` to refuse."""
        if self.kind is bool:
            return {"true": True, "false": False}.get(cell.lower(), cell)
        if self.kind in (int, float):
            try:
                return self.kind(cell)
            except ValueError:
                return cell
        return cell

    def to_json(self, value: Any) -> Any:
        """Return a held value as JSON, such that `check` returns it again."""
        if isinstance(self.constraint, Interval):
            # Without the exponents in which JSON would have a small number.
            return "-".join(np.format_float_positional(end, trim="-") for end in value)
        if isinstance(value, tuple):
            return "x".join(map(str, value))
        return str(value) if isinstance(self.constraint, File) else value


@functools.cache
def fields_of(cls: type) -> dict[str, Field]:
    """Return the fields of a dataclass that have a `Doc`, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for f in dataclasses.fields(cls):
        base, *marks = typing.get_args(hints[f.name]) or (hints[f.name],)
        doc = next((mark for mark in marks if isinstance(mark, Doc)), None)
        if doc is not None:
            is_union = typing.get_origin(base) in (typing.Union, types.UnionType)
            kind = typing.get_args(base)[0] if is_union else base
            default = None if f.default is dataclasses.MISSING else f.default
            found[f.name] = Field(f.name, kind, doc, tuple(marks), default)
    return found


def check_fields(
    cls: type, values: Mapping[str, Any], called: Callable[[str], str] = str
) -> dict[str, Any]:
    """Return what the fields of a dataclass hold of values as JSON has them; None is left out.

    Args:
      cls: the dataclass.
      values: by the names of its fields.
      called: what messages call a field.

    Raises:
      UserError: there is no such field, or no such value.
    """
    fields = fields_of(cls)
    check_names(values, fields)
    given = {name: value for name, value in values.items() if value is not None}
    return {name: fields[name].check(value, called(name)) for name, value in given.items()}


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise `UserError` for an unknown name, with the nearest known one."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
            raise UserError(f"there is no key {reprlib.repr(name)}: {hint}")


def flag(name: str) -> str:
    """Return what the command line calls a field."""
    return f"--{name.replace('_', '-')}"


def _plain(number: int | float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _unexpected(name: str, value: Any, expected: str) -> UserError:
    return UserError(f"{name} is {reprlib.repr(value)}: expected {expected}.")
