"""Fields of a dataclass that users set, described by the metadata of their annotations.

    strength: Annotated[float | None, Range(0, 1), Doc("Noise added.", "Editing")] = None

From one such line come a command-line flag with its help, a column of a prompt file with its check,
and a value in JSON and back. A constraint has a method `check(name, value, kind)` that takes a
value as JSON has it and returns what the field holds, or raises `UserError`.
"""

import dataclasses
import difflib
import functools
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
from etils import epath

from jaxdiff.errors import UserError

LARGEST_FLOAT = float(np.finfo(np.float32).max)
SMALLEST_FLOAT = float(np.finfo(np.float32).tiny)
LARGEST_INT = int(np.iinfo(np.int32).max)
LARGEST_SEED = 2**32 - 1

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
    """Finite numbers from low to high; in a field of integers, whole ones.

    Attributes:
      low: the least; by default that of float32, or of int32.
      high: the largest, likewise; infinity makes infinity a value.
      ends: whether low and high belong to the range, "[" and "]", or not, "(" and ")". A number
        that float32 rounds to an excluded end is excluded, too.
    """

    low: int | float | None = None
    high: int | float | None = None
    ends: Literal["[]", "[)", "(]", "()"] = "[]"

    def check(self, name: str, value: Any, kind: Any) -> int | float:
        """Raise `UserError` for other types, and outside the range; NaN is in no range."""
        number = value.item() if getattr(value, "ndim", None) == 0 else value
        kinds = (int,) if kind is int else (int, float)
        if type(number) not in kinds or not self._contains(number, kind):
            raise unexpected(name, value, self._expected(kind))
        return kind(number) + 0  # -0.0 becomes 0.0

    def _contains(self, number: int | float, kind: Any) -> bool:
        largest = LARGEST_INT if kind is int else LARGEST_FLOAT
        low = -largest if self.low is None else self.low
        high = largest if self.high is None else self.high
        if not low <= number <= high:
            return False
        if kind is int:
            return True
        if abs(number) > LARGEST_FLOAT:
            return number in (low, high) and math.isinf(number)
        rounded = float(np.float32(number))
        rounded = 0.0 if abs(rounded) < SMALLEST_FLOAT else rounded
        above = rounded > low or self.ends[0] == "["
        return above and (rounded < high or self.ends[1] == "]")

    def _expected(self, kind: Any) -> str:
        what = "whole number" if kind is int else "number"
        after, before = ("more than " * (self.ends[0] == "("), "less than " * (self.ends[1] == ")"))
        match self.low, self.high:
            case None, None:
                return f"a {what}"
            case 0, None | math.inf if after:
                return f"a positive {what}"
            case low, None | math.inf:
                return f"a {what}, {after or 'at least '}{_plain(low)}"
            case None, high:
                return f"a {what}, {before or 'at most '}{_plain(high)}"
            case low, high:
                return f"a {what} from {after}{_plain(low)} to {before}{_plain(high)}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, LARGEST_SEED)]
Positive = Annotated[float, Range(0, ends="(]")]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, "[)")]


@dataclass(frozen=True)
class Choices:
    """One of some texts."""

    values: tuple[str, ...]

    def check(self, name: str, value: Any, kind: Any) -> str:
        """Raise `UserError` for anything else."""
        if not isinstance(value, str) or value not in self.values:
            raise unexpected(name, value, f"one of {', '.join(self.values)}")
        return value


@dataclass(frozen=True)
class Text:
    """Text in UTF-8, or of any bytes; `number` accepts an integer too, as its digits."""

    empty: bool = False
    number: bool = False
    any_bytes: bool = False

    def check(self, name: str, value: Any, kind: Any) -> Any:
        """Raise `UserError` for other types, and for blank text unless it may be empty."""
        if self.number and type(value) is int:
            return str(value)
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(value, str):
            raise unexpected(name, value, "a text")
        try:
            value.encode(errors="surrogateescape" if self.any_bytes else "strict")
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

    any_bytes: bool = True

    def check(self, name: str, value: Any, kind: Any) -> epath.Path:
        """Raise `UserError` for what is no text, and for addresses other than gs://."""
        path = super().check(name, value, str)
        if "://" in str(path) and not str(path).startswith("gs://"):
            raise unexpected(name, value, "the path of a file")
        return epath.Path(path)


@dataclass(frozen=True)
class Files(File):
    """The paths of files: a list, or one text with `|` between them."""

    def check(self, name: str, value: Any, kind: Any) -> tuple[epath.Path, ...]:
        """Raise `UserError` as `File` does for each, and for an empty list."""
        values = value if isinstance(value, list | tuple) else [value]
        texts = [x for v in values for x in (v.split("|") if isinstance(v, str) else [v])]
        if not texts:
            raise unexpected(name, value, "the paths of files")
        return tuple(File.check(self, name, text, str) for text in texts)


@dataclass(frozen=True)
class Switch:
    """True or false."""

    def check(self, name: str, value: Any, kind: Any) -> bool:
        """Raise `UserError` for anything else."""
        if type(value) not in (bool, np.bool_):
            raise unexpected(name, value, "true or false")
        return bool(value)


@dataclass(frozen=True)
class Interval:
    """Two numbers in [0, 1], a tuple or spelled LOW-HIGH."""

    def check(self, name: str, value: Any, kind: Any) -> tuple[float, float]:
        """Raise `UserError` for another spelling or order."""
        number = r"((?:[0-9]+\.)?[0-9]+|\.[0-9]+)"
        match = re.fullmatch(f"{number}-{number}", value) if isinstance(value, str) else None
        ends = tuple(map(float, match.groups())) if match else value
        if isinstance(ends, tuple) and len(ends) == 2:
            low, high = (Range(0, 1).check(name, end, float) for end in ends)
            if low <= high:
                return low, high
        raise unexpected(name, value, "LOW-HIGH from 0 to 1, such as 0.3-1")


@dataclass(frozen=True)
class Size:
    """Width and height in pixels, a tuple or WIDTHxHEIGHT, or their ratio, WIDTH:HEIGHT."""

    largest: int

    def check(self, name: str, value: Any, kind: Any) -> tuple[int, int] | str:
        """Raise `UserError` for another spelling or a side that is too long."""
        if isinstance(value, str) and ":" in value:
            return value  # which ratios exist depends on the model
        if isinstance(value, tuple) and len(value) == 2:
            side = Range(0, self.largest)  # the least depends on the model
            width, height = (side.check(name, length, int) for length in value)
            return int(width), int(height)
        match = (
            re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", value) if isinstance(value, str) else None
        )
        if not match:
            raise unexpected(name, value, "WIDTHxHEIGHT, such as 64x64, or a ratio, such as 16:9")
        width, height = int(match[1]), int(match[2])
        if max(width, height) > self.largest:
            raise UserError(f"{name} is {value}: expected at most {self.largest} pixels a side.")
        return width, height


_METAVARS = {Choices: "NAME", File: "FILE", Files: "FILE", Interval: "LOW-HIGH", Size: "SIZE"}


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
    def flag_type(self) -> Any:
        """How the command line reads it: a number, a switch, or the text or texts of JSON."""
        if isinstance(self.constraint, Files):
            return tuple[str, ...]
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
            return ("|" if isinstance(self.constraint, Files) else "x").join(map(str, value))
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


def _plain(number: Any) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def unexpected(name: str, value: Any, expected: str) -> UserError:
    """Return the error for a value."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "too long a number"
    text = " ".join(text.split())  # of an array
    return UserError(f"{name} is {text}: expected {expected}.")
