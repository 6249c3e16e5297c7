"""Serialize frozen dataclasses to JSON and back.

A dataclass becomes {"type": class name, ...}. Its class must be in the annotation of the field, in
`types` or in `accept_types`; no code is imported.
"""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from jaxdiff.errors import FieldError, UserError


def to_json(value: Any) -> Any:
    """Convert dataclasses to dicts with their type, and tuples to lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


_accepted: list[type] = []


@contextlib.contextmanager
def accept_types(types: Sequence[type]) -> Iterator[None]:
    """Let `from_json` accept further dataclasses within the context, those of `--plugin`."""
    before = _accepted.copy()
    _accepted.extend(types)
    try:
        yield
    finally:
        _accepted[:] = before


def accepted_types() -> tuple[type, ...]:
    """Return the dataclasses of the contexts of `accept_types`."""
    return tuple(_accepted)


def from_json(
    annotation: Any, data: Any, path: str = "config", *, types: Sequence[type] = ()
) -> Any:
    """Return the value that `to_json` wrote, given its expected type.

    Args:
      annotation: the expected type, or a union of types.
      data: what `json.loads` returned.
      path: of the value, for errors.
      types: further dataclasses, accepted where one of their base classes is expected.

    Raises:
      UserError: a type, key or value is unexpected; the message names the nearest.
    """
    candidates = members(annotation)
    if isinstance(data, dict):
        return _object_from_json(candidates, data, path, types)
    tuples = [c for c in candidates if typing.get_origin(c) is tuple]
    if isinstance(data, list) and tuples:
        inner = typing.get_args(tuples[0])
        kinds = [inner[0]] * len(data) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) == len(data):
            pairs = enumerate(zip(kinds, data, strict=True))
            return tuple(
                from_json(kind, value, f"{path}[{i}]", types=types) for i, (kind, value) in pairs
            )
    if type(data) is int and float in candidates and int not in candidates:
        return float(data)
    if not any(_fits(data, candidate) for candidate in candidates):
        raise UserError(
            f"{path} is {data!r}: expected {' or '.join(_name(c) for c in candidates)}; {_FOREIGN}"
        )
    return data


_FOREIGN = "the file was written by another version of jaxdiff or edited by hand."


def _object_from_json(
    candidates: list[Any], data: dict[str, Any], path: str, types: Sequence[type]
) -> Any:
    """Return the dataclass that a JSON object describes, one of the candidates or of `types`."""
    bases = tuple(c for c in candidates if isinstance(c, type) and c is not type(None))
    named = [t for t in (*_accepted, *types) if bases and issubclass(t, bases)]
    classes: dict[str, Any] = {
        _name(c): c for c in [*candidates, *named] if dataclasses.is_dataclass(c)
    }
    name = data.get("type")
    if not isinstance(name, str) or name not in classes:
        raise UserError(
            f"{path} is of type {name}: expected "
            f"{' or '.join(classes) or 'a value'}; name a type of your own in types=[...] or with "
            f"--plugin, or else {_FOREIGN}"
        )
    cls = classes[name]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {name: value for name, value in data.items() if name != "type"}
    for name in given:
        if name not in fields:
            raise unknown_key(f"{path}.{name}", [f"{path}.{k}" for k in fields])
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise UserError(f"{path}.{name} is missing: {_FOREIGN}")
    values = {k: from_json(hints[k], v, f"{path}.{k}", types=types) for k, v in given.items()}
    try:
        return cls(**values)
    except FieldError as error:
        raise error.called(f"{path}.{error.field}") from None


def _fits(data: Any, candidate: Any) -> bool:
    """Whether a JSON scalar is of this type."""
    if typing.get_origin(candidate) is Literal:
        return data in typing.get_args(candidate)
    return type(data) is candidate


def _name(candidate: Any) -> str:
    if typing.get_origin(candidate) is Literal:
        return " or ".join(repr(value) for value in typing.get_args(candidate))
    return "null" if candidate is type(None) else getattr(candidate, "__name__", str(candidate))


def members(annotation: Any) -> list[Any]:
    """Return the members of a union, or the type itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in members(a)]
    return [annotation]


def unknown_key(key: str, known: list[str]) -> UserError:
    """Return the error for an unknown key, with the nearest known one."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(known)}."
    return UserError(f"{key} is not a key of this recipe: {hint}")


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return `{"train.steps": 10, ...}` for a value of `to_json`."""
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for name, inner in value.items():
            flat |= flatten(inner, f"{path}.{name}" if path else name)
        return flat
    return {path: value}


def types_in(value: Any) -> tuple[type, ...]:
    """Return the types of all dataclasses in a value, including its own."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (getattr(value, f.name) for f in dataclasses.fields(value))
        inner = [t for field in fields for t in types_in(field)]
        return tuple(dict.fromkeys([type(value), *inner]))
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(t for item in value for t in types_in(item)))
    return ()
