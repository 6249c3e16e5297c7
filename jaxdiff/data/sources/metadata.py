"""Read the metadata files of an image folder: JSON Lines, CSV or Parquet, as Hugging Face names."""

from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.io.files import read_bytes
from jaxdiff.io.text import LARGEST_TEXT, csv_rows, decode_text, lines_of, parse_json

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def is_metadata(file: str) -> bool:
    """Whether a file's name is that of metadata, in upper or lower case."""
    return PurePosixPath(file).name.lower() in METADATA


class Line(NamedTuple):
    """One line of a metadata file: paths of images in the file's folder, and all values."""

    where: str
    file_name: str
    references: list[str]
    values: dict[str, Any]


def read_metadata(file: epath.Path, caption: str, reference: str | None) -> list[Line]:
    """Read the lines of a metadata file.

    Args:
      file: its path.
      caption: the key of captions, for messages.
      reference: the key of paths of reference images; None reads none.

    Raises:
      UserError: the file or one of its lines is malformed, or names a file outside the folder.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv_lines, ".parquet": _parquet_rows}
    lines = []
    for number, row in readers[file.suffix.lower()](file):
        where = f"Line {number} of {file}"
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(
                f'{where} does not name an image: expected {{"file_name": "...", "{caption}": '
                '"..."}; correct that line.'
            )
        named = _references(row, reference, where) if reference is not None else []
        references = [_inside(name, where, str(reference)) for name in named]
        lines.append(Line(where, _inside(row["file_name"], where, "file_name"), references, row))
    return lines


def _references(row: dict[str, Any], key: str, where: str) -> list[str]:
    """Return the paths of reference images: a list, or a string with "|" between them."""
    value = row.get(key) or []
    names = value.split("|") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{where} has {value!r} under {key!r}: expected the path of a reference image, or a "
            "list of paths; correct that line."
        )
    return names


def _text(file: epath.Path) -> str:
    """Return the text of a file; a byte that is not UTF-8, as a surrogate, spoils only its line."""
    data = read_bytes(file, "a metadata file that can be read", largest=LARGEST_TEXT)
    return decode_text(data, file, by_line=True)


def _json_lines(file: epath.Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines_of(_text(file)), start=1):
        if line.strip():
            yield number, parse_json(line, f"Line {number} of {file}", by_value=True)


def _csv_lines(file: epath.Path) -> Iterator[tuple[int, dict[str, str]]]:
    names: list[str] | None = None
    for line, row in csv_rows(_text(file)):
        where = f"Line {line} of {file}"
        if isinstance(row, str):
            raise UserError(f"{where}: {row}")
        if names is None:
            _check_unique(names := row, file)
        elif len(row) != len(names):
            raise UserError(
                f"{where} has {len(row)} values: expected {len(names)}, as in its first line; "
                "correct that line."
            )
        else:
            yield line, dict(zip(names, row, strict=True))


def _parquet_rows(file: epath.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with file.open("rb") as opened:
            table = pq.read_table(opened)
        _check_unique(table.column_names, file)
        yield from enumerate(table.to_pylist(), start=1)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as Parquet ({error}): write it again.") from error


def _check_unique(names: list[str], file: epath.Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{file} has several columns {twice[0]!r}: expected one of each name.")


def _inside(file_name: str, where: str, key: str) -> str:
    """Normalise a path under `key`; raise `UserError` if it is outside the folder."""
    path = PurePosixPath(file_name)
    # Windows drives and UNC names count as absolute on every platform.
    absolute = path.is_absolute() or PureWindowsPath(file_name).anchor or "://" in file_name
    if absolute or ".." in path.parts or ".." in PureWindowsPath(file_name).parts:
        raise UserError(
            f"{where} names {file_name!r}, which is outside the folder: "
            f"{key} must be relative to the folder and stay inside it."
        )
    return str(path)
