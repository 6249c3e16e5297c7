"""JSON configs of other libraries: each key is used, has no effect, or must have a neutral value.

A `Schema` declares every key of one class of config. `read_keys` checks a file against it and
returns the values of the keys that are used, with the library's defaults of missing ones.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxdiff.errors import UserError

MOST_LEVELS = 16
MOST_LAYERS = 256  # of a transformer


class Kind(NamedTuple):
    """What values of a key mean.

    Attributes:
      expected: for the message.
      parse: returns our value, or raises ValueError or TypeError.
    """

    expected: str
    parse: Callable[[Any], Any]


@dataclass(frozen=True)
class Used:
    """A key that is read.

    Attributes:
      default: the library's value of a missing key, as JSON has it.
      kind: of the values.
      field: our field of this value, for `named_fields` and `write_keys`.
    """

    default: Any
    kind: Kind
    field: str | None = None


@dataclass(frozen=True, init=False)
class Only:
    """A key that must have one of a few values, the neutral ones.

    Attributes:
      values: the supported values.
      default: the library's value of a missing key; by default the first supported one.
    """

    values: tuple[Any, ...]
    default: Any

    def __init__(self, *values: Any, **default: Any):
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "default", default.get("default", values[0]))


@dataclass(frozen=True)
class Unused:
    """A key without effect on a model's outputs.

    Attributes:
      reason: why.
    """

    reason: str


Schema = Mapping[str, Used | Only | Unused]


def read_keys(what: str, config: Any, schema: Schema) -> dict[str, Any]:
    """Check every key of a config, and return the values of those that are used.

    Keys whose names begin with `_` are comments. An unknown key may only be null: even false may
    differ from its default.

    Args:
      what: the file or model, for the message.
      config: the parsed JSON.
      schema: of the config.

    Raises:
      UserError: a key is unknown, or has a value that is not supported; the message names it.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{what} is not a config: expected a JSON object; use another model.")
    for key, value in config.items():
        if key not in schema and not key.startswith("_") and value is not None:
            raise UserError(
                f"{what}: the key {key!r} ({_short(value)}) is unknown to jaxdiff and may change "
                "the model: use a model without it."
            )
    values = {}
    for key, rule in schema.items():
        if isinstance(rule, Unused):
            continue
        value = config.get(key, rule.default)
        missing = "" if key in config else ", the default of a missing key"
        if isinstance(rule, Only):
            if value not in rule.values:
                raise UserError(
                    f"{what}: {key} is {_short(value)}{missing}, which jaxdiff does not support: "
                    f"expected {' or '.join(map(repr, rule.values))}; use another model."
                )
            continue
        try:
            values[key] = rule.kind.parse(value)
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"{what}: {key} is {_short(value)}{missing}: expected {rule.kind.expected}; use "
                "another model."
            ) from error
    return values


def named_fields(values: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """Return the values of `read_keys` that are fields of ours, by their names."""
    rules = {key: rule for key, rule in schema.items() if isinstance(rule, Used)}
    return {rule.field: values[key] for key, rule in rules.items() if rule.field}


def write_keys(fields: Any, schema: Schema) -> dict[str, Any]:
    """Return the config of our fields: the inverse of `named_fields`."""
    values = {
        key: getattr(fields, rule.field)
        for key, rule in schema.items()
        if isinstance(rule, Used) and rule.field
    }
    return {key: list(x) if isinstance(x, tuple) else x for key, x in values.items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def integer(low: int, high: int) -> Kind:
    """Whole numbers, also written as 8.0."""

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or int(value) != value:
            raise TypeError
        if not low <= value <= high:
            raise ValueError
        return int(value)

    return Kind(f"a whole number from {low} to {high}", parse)


def number(low: float, high: float) -> Kind:
    """Finite numbers strictly between two bounds."""

    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError
        if not (low < value < high and math.isfinite(value)):
            raise ValueError
        return float(value)

    return Kind(f"a number between {low:g} and {high:g}", parse)


def choice(values: Collection[str] | Mapping[str, Any]) -> Kind:
    """One of a few texts; a mapping translates them."""

    def parse(value: Any) -> Any:
        if not isinstance(value, str) or value not in values:
            raise ValueError
        return values[value] if isinstance(values, Mapping) else value

    return Kind(" or ".join(values), parse)


def optional(kind: Kind) -> Kind:
    """A value or null."""
    return Kind(
        f"{kind.expected}, or null", lambda value: None if value is None else kind.parse(value)
    )


def several(kind: Kind) -> Kind:
    """A list."""

    def parse(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= MOST_LEVELS:
            raise ValueError
        return tuple(kind.parse(x) for x in value)

    return Kind(f"a list of 1 to {MOST_LEVELS}, each {kind.expected}", parse)


def one_or_several(kind: Kind) -> Kind:
    """A value, or a list with one for each level."""
    many = several(kind)

    def parse(value: Any) -> Any:
        return many.parse(value) if isinstance(value, list | tuple) else kind.parse(value)

    return Kind(f"{kind.expected}, or a list of these", parse)


def side(low: int, high: int, *, square: bool = True) -> Kind:
    """A side, as a number or as height and width, which are equal if `square`."""
    one = integer(low, high)

    def parse(value: Any) -> int:
        pair = value if isinstance(value, list | tuple) else (value, value)
        height, width = (one.parse(x) for x in pair)
        if square and height != width:
            raise ValueError
        return height

    return Kind(f"{one.expected}, or two{' equal' if square else ''} ones", parse)


def _flag(value: Any) -> bool:
    if value is not None and value not in (True, False):
        raise ValueError
    return bool(value)


FLAG = Kind("true or false", _flag)

OFF = Only(False, None)
"""A switch that must be off."""


def each(what: str, value: Any, count: int) -> tuple[Any, ...]:
    """Return one value per level, from a tuple of them or from one for all.

    Raises:
      UserError: a tuple of another length.
    """
    values = value if isinstance(value, tuple) else (value,) * count
    if len(values) != count:
        raise UserError(
            f"{what} has {len(values)} values: expected one for all or {count}, one per level of "
            "block_out_channels; use another model."
        )
    return values
