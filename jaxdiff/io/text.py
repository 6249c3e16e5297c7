"""Read text and JSON that users or other programs wrote: one reader for all of it.

Captions, metadata, prompt files and configs come in many encodings, with byte-order marks, with
separators that only look like newlines, and sometimes with contents meant to exhaust a parser.
"""

import codecs
import json
import math
import re
from typing import Any

from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.io.files import read_bytes

LARGEST_TEXT = 256 * 2**20
"""Bytes of a text file."""

DEEPEST_JSON = 64
"""Levels of nested lists and objects."""

LONGEST_NUMBER = 400
"""Digits of a number in JSON; a double needs at most 309 before its point."""

# The longest mark first: that of UTF-32-LE begins with that of UTF-16-LE.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def decode_text(data: bytes, name: object) -> str:
    """Return the text of a file, without its byte-order mark.

    Args:
      data: UTF-8, or UTF-16 or UTF-32 with a byte-order mark.
      name: what messages call the text.

    Raises:
      UserError: the bytes are in another encoding, hold a NUL, or are too many.
    """
    if len(data) > LARGEST_TEXT:
        raise UserError(f"{name} is too long: expected at most {LARGEST_TEXT} bytes of text.")
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    try:
        text = data[len(mark) :].decode(_MARKS.get(mark, "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {len(mark) + error.start}): save it as UTF-8."
        ) from error
    check_text(text, name)
    return text


def check_text(text: str, name: object) -> None:
    """Check text that may hold bytes which are not UTF-8, as surrogates, or a NUL.

    Raises:
      UserError: it does.
    """
    if "\0" in text:
        raise UserError(f"{name} holds a NUL, which is no text: save it as UTF-8.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not UTF-8: save or type it as UTF-8.") from error


def lines_of(text: str) -> list[str]:
    """Split text at newlines (LF, CRLF or CR) only, unlike `str.splitlines`.

    Vertical tabs, form feeds and Unicode's separators stay inside a line.
    """
    lines = re.split(r"\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def read_text(path: epath.PathLike, wanted: str = "a text file") -> str:
    """Read a text file as `decode_text` does.

    Raises:
      UserError: it cannot be read or is no text; the message asks for `wanted`.
    """
    return decode_text(read_bytes(path, wanted, largest=LARGEST_TEXT), path)


def parse_json(data: bytes | str, name: object, *, infinities: bool = False) -> Any:
    """Parse JSON, with limits on depth and on the digits of numbers.

    Args:
      data: text, or bytes as `decode_text` takes them.
      name: what messages call it.
      infinities: accept Infinity and -Infinity, which diffusers writes.

    Raises:
      UserError: it is not JSON, holds NaN or an infinity, a text that is not Unicode, or goes
        beyond the limits.
    """
    text = decode_text(data, name) if isinstance(data, bytes) else data.removeprefix("\ufeff")
    _check_depth(text, name)
    try:
        constant = _infinity if infinities else _constant
        value = json.loads(text, parse_int=_int, parse_float=_float, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{name} is not valid JSON ({reason}{where}): correct it.") from error
    if re.search(r"\\u[dD][89a-fA-F]", text):  # halves of a pair, which may stand alone
        check_text(json.dumps(value, ensure_ascii=False), name)
    return value


def read_json(
    path: epath.PathLike, wanted: str = "a JSON file", *, infinities: bool = False
) -> Any:
    """Read a JSON file as `parse_json` does.

    Raises:
      UserError: it cannot be read or is not JSON; the message asks for `wanted`.
    """
    data = read_bytes(path, wanted, largest=LARGEST_TEXT)
    return parse_json(data, path, infinities=infinities)


def _check_depth(text: str, name: object) -> None:
    """Raise `UserError` for deep nesting, which would exhaust the parser's stack or its callers'.

    Strings are cut out first, as brackets inside them open nothing.
    """
    if text.count("[") + text.count("{") <= DEEPEST_JSON:
        return
    depth = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', text, re.DOTALL):
        if token[0] in "[{":
            depth += 1
            if depth > DEEPEST_JSON:
                raise UserError(
                    f"{name} is nested more than {DEEPEST_JSON} levels deep, which no file that "
                    "jaxdiff reads is: use another file."
                )
        elif token[0] in "]}":
            depth -= 1


def _int(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    if len(digits) > LONGEST_NUMBER or not math.isfinite(float(digits)):
        raise ValueError(f"the number {digits[:20]} is out of range")
    return float(digits)


def _infinity(name: str) -> float:
    return float(name) if name != "NaN" else _constant(name)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
