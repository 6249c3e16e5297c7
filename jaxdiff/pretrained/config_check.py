"""JSON configs of other libraries: every key is read, known to have no effect, or an error."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxdiff.errors import UserError

Fixed = Mapping[str, tuple[Any, ...] | None]
"""Keys that are not read, with the supported values; None for any."""

Keys = Mapping[str, tuple[str, Any]]
"""Keys of a config, with the name of our field and the default of a missing key."""


def read_keys(config: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """Return our fields as a config states them, lists as tuples."""
    values = {ours: config.get(theirs, default) for theirs, (ours, default) in keys.items()}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}


def write_keys(fields: Any, keys: Keys) -> dict[str, Any]:
    """Return the config of our fields: the inverse of `read_keys`."""
    values = {theirs: getattr(fields, ours) for theirs, (ours, _) in keys.items()}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}


def check_config(what: str, config: Mapping[str, Any], read: Collection[str], fixed: Fixed) -> None:
    """Check that every key of a config is known.

    An unknown key is ignored if its value is null or false, or its name begins with `_`.

    Args:
      what: the file or model, for the message.
      config: the parsed JSON.
      read: the keys that the caller reads.
      fixed: other keys, with the supported values.

    Raises:
      UserError: a key is unknown, or has a value that is not supported.
    """
    for key, value in config.items():
        if key in read or key.startswith("_"):
            continue
        if key not in fixed:
            if value is not None and value is not False:
                raise UserError(
                    f"{what}: the key {key!r} ({value!r}) is unknown to jaxdiff and may change the "
                    "model: use a model without it."
                )
            continue
        expected = fixed[key]
        if expected is not None and value not in expected:
            raise UserError(
                f"{what}: {key} is {value!r}, which jaxdiff does not support: expected "
                f"{' or '.join(map(repr, expected))}; use another model."
            )


def each(what: str, value: Any, count: int) -> tuple[Any, ...]:
    """Return one value per level, from a list of them or from one for all.

    Raises:
      UserError: a list of another length.
    """
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * count
    if len(values) != count:
        raise UserError(f"{what} has {len(values)} values: expected one for all or {count}.")
    return values
