"""Reading other people's JSON configs: what is understood is taken, what is not is said."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxdiff.errors import UserError

Fixed = Mapping[str, tuple[Any, ...] | None]
"""Keys that leave no choice, with the values that are understood; None: whatever it is."""


def check_config(what: str, config: Mapping[str, Any], read: Collection[str], fixed: Fixed) -> None:
    """Raises `UserError` naming a key of a config that would be lost on us.

    Args:
      what: the file or model, for the message.
      config: the parsed JSON.
      read: the keys that the caller reads.
      fixed: the keys that leave no choice.

    A key that is not known is passed over where it is off: null, false or beginning with `_`.
    """
    for key, value in config.items():
        if key in read or key.startswith("_"):
            continue
        if key not in fixed:
            if value is not None and value is not False:
                raise UserError(
                    f"{what}: jaxdiff does not know the key {key!r} ({value!r}); it cannot tell "
                    "whether the model would be the same without it."
                )
            continue
        expected = fixed[key]
        if expected is not None and value not in expected:
            raise UserError(
                f"{what}: {key} is {value!r}, which jaxdiff does not have: expected "
                f"{' or '.join(map(repr, expected))}."
            )


def each(what: str, value: Any, count: int) -> tuple[Any, ...]:
    """One value for each of `count` levels, from a list of them or from one for all.

    Raises:
      UserError: a list of another length.
    """
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * count
    if len(values) != count:
        raise UserError(f"{what} has {len(values)} values: expected one for all or {count}.")
    return values
