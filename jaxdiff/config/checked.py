"""`checked`: a dataclass whose constructor checks its fields by their annotations.

    @checked
    @dataclass(frozen=True, kw_only=True)
    class AdamW:
        learning_rate: Positive = 1e-4
        clip_norm: Annotated[float | None, Range(0, math.inf, "(]")] = 1.0

The same check applies to Python, recipes, JSON and flags. Without a constraint in its annotation,
a float is finite and within float32, and an integer within int32; a `Literal`, a class
and each element of a tuple are checked too. The constructor holds what the check returns: NumPy's
scalars become Python's, and lists become tuples.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import numpy as np

from jaxdiff.config.fields import Constraint, Range, Switch, Text, unexpected
from jaxdiff.config.serialization import members
from jaxdiff.errors import FieldError, UserError

_Class = TypeVar("_Class", bound=type)

_CONSTRAINTS: dict[Any, Constraint] = {
    float: Range(),
    int: Range(),
    bool: Switch(),
    str: Text(empty=True, any_bytes=True),  # paths are texts
}
"""What values have that no constraint describes."""


def checked(cls: _Class) -> _Class:
    """Make the constructor of a dataclass raise `FieldError` for values that its fields forbid."""
    construct = cls.__init__

    @functools.wraps(construct)
    def constructor(self, **values: Any):
        kinds = _kinds(cls)
        for name, value in values.items():
            if name in kinds:
                try:
                    values[name] = check_value("", value, kinds[name])
                except UserError as error:
                    raise FieldError(cls, name, value, str(error)) from None
        construct(self, **values)

    setattr(cls, "__init__", constructor)  # noqa: B010  # which a type checker allows
    return cls


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    """Return the annotations of a dataclass' fields, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def check_value(name: str, value: Any, kind: Any) -> Any:
    """Return what a field of an annotation holds of a value.

    Raises:
      UserError: the value is not allowed; `name` begins the message.
    """
    marks: list[Any] = []
    if typing.get_origin(kind) is Annotated:
        kind, *marks = typing.get_args(kind)
    candidates = members(kind)
    if value is None and type(None) in candidates:
        return None
    candidates = [c for c in candidates if c is not type(None)]
    constraint = next((mark for mark in marks if isinstance(mark, Constraint)), None)
    if constraint is not None:
        return constraint.check(name, value, candidates[0])
    if len(candidates) == 1:
        return _check_one(name, value, candidates[0])
    for candidate in candidates:
        try:
            return _check_one(name, value, candidate)
        except UserError:
            continue
    raise unexpected(name, value, " or ".join(map(_called, candidates)))


def _check_one(name: str, value: Any, kind: Any) -> Any:
    """Return what a field of one type, no union, holds of a value."""
    if kind in _CONSTRAINTS:
        return _CONSTRAINTS[kind].check(name, value, kind)
    origin = typing.get_origin(kind)
    if origin in (Annotated, typing.Union, types.UnionType):
        return check_value(name, value, kind)
    if origin is Literal:
        if not isinstance(value, str) or value not in typing.get_args(kind):
            raise unexpected(name, value, _called(kind))
        return value
    if origin is tuple:
        return _check_tuple(name, value, kind)
    expected = origin or kind
    if expected is Any or not isinstance(expected, type) or not _is_checkable(expected):
        return value
    if not isinstance(value, expected):
        raise unexpected(name, value, _called(kind))
    return value


def _check_tuple(name: str, value: Any, kind: Any) -> tuple[Any, ...]:
    inner = typing.get_args(kind)
    if not isinstance(value, tuple | list | np.ndarray):
        raise unexpected(name, value, _called(kind))
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
        raise unexpected(name, value, _called(kind))
    pairs = enumerate(zip(value, kinds, strict=True))
    return tuple(check_value(f"{name}[{i}]", item, kind) for i, (item, kind) in pairs)


def _is_checkable(kind: type) -> bool:
    """Whether isinstance decides: not for arrays, nor for protocols that do not support it."""
    if kind.__module__.partition(".")[0] in ("jax", "jaxlib", "jaxtyping", "numpy"):
        return False
    return not getattr(kind, "_is_protocol", False) or getattr(kind, "_is_runtime_protocol", False)


def _called(kind: Any) -> str:
    """Return what messages call a type."""
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    inner = typing.get_args(kind)
    match typing.get_origin(kind):
        case origin if origin is Annotated:
            return _called(inner[0])
        case origin if origin is Literal:
            return f"one of {', '.join(map(str, inner))}"
        case origin if origin is tuple:
            count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
            return f"a tuple of {count}{_called(inner[0]).removeprefix('a ')}s"
        case origin if origin is Callable:
            return "a function"
        case origin if origin in (typing.Union, types.UnionType):
            return " or ".join(_called(a) for a in inner if a is not type(None))
    return names.get(kind) or getattr(kind, "__name__", str(kind))
