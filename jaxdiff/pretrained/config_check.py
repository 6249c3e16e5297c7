"""JSON configs of other libraries: each key is either read, known to be harmless, or refused."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from jaxdiff.errors import UserError

Fixed = Mapping[str, tuple[Any, ...] | None]
"""Keys that leave no choice, with the supported values; None for any."""


def read_json(path: epath.Path) -> Any:
    """Read a JSON file.

    Raises:
      UserError: there is none, or it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: copy the whole folder of the model.") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"{path} is not valid JSON ({error}): copy it again.") from error


def check_config(what: str, config: Mapping[str, Any], read: Collection[str], fixed: Fixed) -> None:
    """Check that every key of a config is understood.

    An unknown key is ignored where it is off: null, false or beginning with `_`.

    Args:
      what: the file or model, for the message.
      config: the parsed JSON.
      read: the keys that the caller reads.
      fixed: the keys that leave no choice.

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
                f"{what}: {key} is {value!r}, which jaxdiff does not have: expected "
                f"{' or '.join(map(repr, expected))}; use a model with that."
            )


def each(what: str, value: Any, count: int) -> tuple[Any, ...]:
    """Return one value for each of `count` levels, from a list of them or from one for all.

    Raises:
      UserError: a list of another length.
    """
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * count
    if len(values) != count:
        raise UserError(f"{what} has {len(values)} values: expected one for all or {count}.")
    return values
