"""Read captions from text and JSON files."""

from typing import Any

from jaxdiff.data.bad_records import NOT_TEXT, TOO_LARGE, RecordError
from jaxdiff.errors import UserError
from jaxdiff.io.text import decode_text, lines_of, parse_json

LARGEST_CAPTIONS = 2**20
"""Bytes of a file with the captions of one image."""


def captions_in(data: bytes, name: str, key: str | None = None) -> list[str]:
    """Return the captions of one image.

    Args:
      data: a text file with one caption per line; with `key`, a JSON object with a caption or a
        list of captions under that key.
      name: what messages call the file.
      key: of the captions.

    Raises:
      RecordError: the file is too large, not text or not JSON.
    """
    if len(data) > LARGEST_CAPTIONS:
        raise RecordError(f"{name} has more than {LARGEST_CAPTIONS} bytes", TOO_LARGE)
    try:
        if key is None:
            return [line.strip() for line in lines_of(decode_text(data, name))]
        values = parse_json(data, name)
    except UserError as error:
        raise RecordError(str(error), NOT_TEXT) from error
    return texts_of(values.get(key) if isinstance(values, dict) else None)


def texts_of(value: Any) -> list[str]:
    """Return the captions in a value of JSON or a column: a string, a list of them, or None.

    A byte-order mark, which a text that was read from a file may begin with, is no part of it.
    """
    values = value if isinstance(value, list) else [value]
    return [text.removeprefix("\ufeff") for text in values if isinstance(text, str)]
