"""Read text and JSON that users or other programs wrote: one reader for all of it.

Captions, metadata, prompt files and configs come in many encodings, with byte-order marks, with
separators that only look like newlines, and sometimes with contents meant to exhaust a parser.
"""

import codecs
import csv
import io
import json
import math
import re
import reprlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.io.files import read_bytes
from jaxdiff.io.terminal import printable

LARGEST_TEXT = 256 * 2**20
"""Bytes of a text file."""

DEEPEST_JSON = 64
"""Levels of nested lists and objects."""

LONGEST_NUMBER = 400
"""Digits of a number in JSON; a double needs at most 309 before its point."""

# Half of a pair of UTF-16, as it is or as JSON escapes it.
_SURROGATE = re.compile("[\ud800-\udfff]|\\\\u[dD][89a-fA-F]")

# The longest mark first: that of UTF-32-LE begins with that of UTF-16-LE.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def decode_text(data: bytes, name: object, *, by_line: bool = False) -> str:
    """Return the text of a file, without its byte-order mark.

    Args:
      data: UTF-8, or UTF-16 or UTF-32 with a byte-order mark.
      name: what messages call the text.
      by_line: leave bytes that are not UTF-8 as surrogates, for `check_text` to refuse the lines
        that have them.

    Raises:
      UserError: the bytes are in another encoding, hold a NUL, or are too many.
    """
    if len(data) > LARGEST_TEXT:
        raise UserError(f"{name} is too long: expected at most {LARGEST_TEXT} bytes of text.")
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    codec = _MARKS.get(mark, "utf-8")
    try:
        errors = "surrogateescape" if by_line and codec == "utf-8" else "strict"
        text = data[len(mark) :].decode(codec, errors)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {len(mark) + error.start}): save it as UTF-8."
        ) from error
    if "\0" in text or not by_line:
        check_text(text, name)
    return text


def check_text(text: str, name: object) -> None:
    """Check text that may hold bytes which are not UTF-8, as surrogates, or a NUL.

    Raises:
      UserError: it does.
    """
    if "\0" in text:
        raise UserError(f"{name} holds a NUL, which no text has: save or type it as UTF-8.")
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


def csv_rows(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the line and the cells, or what is wrong, of each row of CSV that is not blank.

    Quotes are those of RFC 4180: text beside a quoted cell, or a quote that is not closed, is an
    error of its row.
    """
    before = csv.field_size_limit(len(text) + 1)  # a cell that is cut would leave its end as rows
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str] | str]] = []
    try:
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
                if any(cell.strip() for cell in cells):
                    rows.append((line, cells))
            except csv.Error as error:
                through = f", through line {reader.line_num}" if reader.line_num > line else ""
                reason = (
                    f"it is not CSV ({error}{through}): put quotes around cells with commas, "
                    "quotes or newlines, and double the quotes inside them."
                )
                rows.append((line, reason))
    except StopIteration:
        yield from rows
    finally:
        csv.field_size_limit(before)


def read_text(path: epath.PathLike, wanted: str = "a text file") -> str:
    """Read a text file as `decode_text` does.

    Raises:
      UserError: it cannot be read or is no text; the message asks for `wanted`.
    """
    return decode_text(read_bytes(path, wanted, largest=LARGEST_TEXT), path)


def parse_json(
    data: bytes | str, name: object, *, by_value: bool = False, infinities: bool = False
) -> Any:
    """Parse JSON, with limits on depth and on the digits of numbers.

    Args:
      data: text, or bytes as `decode_text` takes them.
      name: what messages call it.
      by_value: leave bytes that are not UTF-8, as surrogates, for the readers of the values.
      infinities: accept Infinity and -Infinity, which diffusers writes.

    Raises:
      UserError: it is not JSON, holds NaN or an infinity, a text that is not Unicode, or two values
        of one key, or goes beyond the limits.
    """
    text = decode_text(data, name) if isinstance(data, bytes) else data.removeprefix("\ufeff")
    _check_depth(text, name)
    try:
        value = json.loads(
            text,
            parse_int=_int,
            parse_float=_float,
            parse_constant=_infinity if infinities else _constant,
            object_pairs_hook=_object,
        )
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"{name} is not valid JSON ({reason}{where}): correct it or copy it again."
        ) from error
    if not by_value and _SURROGATE.search(text):  # perhaps half of a pair, alone
        check_text(json.dumps(value, ensure_ascii=False), name)
    return value


def read_json(
    path: epath.PathLike,
    wanted: str = "a complete copy of its folder",
    *,
    infinities: bool = False,
) -> dict[str, Any]:
    """Read a file with one JSON object, as `parse_json` does.

    Raises:
      UserError: it cannot be read or is no JSON object; the message asks for `wanted`.
    """
    data = read_bytes(path, wanted, largest=LARGEST_TEXT)
    value = parse_json(data, path, infinities=infinities)
    if not isinstance(value, dict):
        raise UserError(f"{path} is {reprlib.repr(value)}, no JSON object: give {wanted}.")
    return value


def format_json(value: Any, *, indent: int | None = None, ascii: bool = True) -> str:
    """Return JSON that `parse_json` and other programs read.

    Numbers that are not finite become null, and bytes without a character, as in some file names,
    escapes such as `\\xe9`. `ascii` escapes all characters that are not ASCII.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=ascii, allow_nan=False)
        if not _SURROGATE.search(text):
            return text
    except ValueError:  # a number that is not finite
        pass
    return json.dumps(_writable(value), indent=indent, ensure_ascii=ascii, allow_nan=False)


def _writable(value: Any) -> Any:
    if isinstance(value, dict):
        return {_writable(key): _writable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", lambda match: printable(match[0]), value)
    return value


def _check_depth(text: str, name: object) -> None:
    """Raise `UserError` for deep nesting, which would exhaust the parser's stack or its callers'.

    Strings are cut out first, as brackets inside them open nothing.
    """
    if text.count("[") + text.count("{") <= DEEPEST_JSON:
        return
    depth = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', text, re.DOTALL):
        if token[0] in "[{":
            depth += 1
            if depth > DEEPEST_JSON:
                raise UserError(
                    f"{name} is nested more than {DEEPEST_JSON} levels deep, which no file that "
                    "jaxdiff reads is: use another file."
                )
        elif token[0] in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; JSON does not say which of two values of one key counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"it has the key {key[:40]!r} twice")
    return found


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
