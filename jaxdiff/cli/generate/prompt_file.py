"""Prompt files: JSON lines, CSV with a header, or one prompt a line.

A row may set every field of `GenerationSettings`. A row that cannot be used is reported with its
line, and the others are read.
"""

import os
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from etils import epath

from jaxdiff.config.fields import check_names, fields_of
from jaxdiff.errors import UserError
from jaxdiff.io.files import read_bytes
from jaxdiff.io.text import LARGEST_TEXT, csv_rows, decode_text, lines_of, parse_json
from jaxdiff.pipelines.resolve import FILES, input_paths
from jaxdiff.pipelines.settings import GenerationSettings

COLUMNS = fields_of(GenerationSettings)


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A row of a prompt file.

    Attributes:
      number: of the row in its file, from 0, without blank lines.
      line: of the file, from 1, where it starts.
      settings: that it sets.
    """

    number: int
    line: int
    settings: GenerationSettings


class BadRow(NamedTuple):
    """A row that generates no image."""

    line: int
    reason: str


class PromptFile(NamedTuple):
    """The valid and invalid rows of a prompt file."""

    rows: list[PromptRow]
    bad: list[BadRow]


def read_prompts(file: epath.PathLike) -> PromptFile:
    """Read the rows of a .jsonl, .csv or .txt file.

    Paths in it are relative to its folder, which they may not leave, not even through a link.

    Raises:
      UserError: the file cannot be read, has another format or no rows, or its CSV header has an
        unknown column.
    """
    path = epath.Path(file)
    readers = {".jsonl": _json_lines, ".csv": _csv_rows, ".txt": _lines}
    if path.suffix.lower() not in readers:
        raise UserError(
            f"{file} has an unknown format: expected a prompt file called .jsonl (a JSON object a "
            "line), .csv (with a header) or .txt (a prompt a line)."
        )
    # A byte that is not UTF-8 invalidates its row alone.
    data = read_bytes(path, "a prompt file", largest=LARGEST_TEXT)
    content = decode_text(data, file, by_line=True)
    rows, bad = [], []
    for number, (line, values) in enumerate(readers[path.suffix.lower()](content)):
        try:
            if isinstance(values, str):
                raise UserError(values)
            settings = _settings(values, path.parent)
            rows.append(PromptRow(number=number, line=line, settings=settings))
        except UserError as error:
            bad.append(BadRow(line, str(error)))
    if not rows and not bad:
        raise UserError(f"{file} holds no prompt: expected at least one row.")
    return PromptFile(rows, bad)


def slug(text: str, otherwise: str = "prompt") -> str:
    """Return text as part of a file name: letters and digits only, so that it names no folder."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].rstrip("-") or otherwise


Read = Iterator[tuple[int, dict[str, Any] | str]]  # line, and its values or its error


def _lines(text: str) -> Read:
    for i, line in enumerate(lines_of(text)):
        if line.strip():
            yield i + 1, {"prompt": line.strip()}


def _json_lines(text: str) -> Read:
    for i, line in enumerate(lines_of(text)):
        if not line.strip():
            continue
        try:
            values = parse_json(line, "it")
        except UserError as error:
            yield i + 1, str(error)
            continue
        if isinstance(values, dict):
            yield i + 1, values
        else:
            yield i + 1, f"it is {reprlib.repr(values)}: expected an object with a prompt."


def _csv_rows(text: str) -> Read:
    """Yield rows by the names in the header; an empty cell sets nothing."""
    header: list[str] | None = None
    for line, cells in csv_rows(text):
        if header is None:
            if isinstance(cells, str):
                raise UserError(f"The header of the prompt file: {cells}")
            header = [cell.strip() for cell in cells]
            _check_header(header)
        elif isinstance(cells, str):
            yield line, cells
        elif len(cells) != len(header):
            yield (
                line,
                (
                    f"it has {len(cells)} cells for {len(header)} columns: put quotes around cells "
                    "with commas or newlines, and leave cells empty rather than out."
                ),
            )
        else:
            pairs = zip(header, cells, strict=True)
            yield line, {key: COLUMNS[key].from_cell(cell) for key, cell in pairs if cell.strip()}


def _check_header(header: list[str]) -> None:
    separator = next((sign for sign in ";\t|" if sign in header[0]), None)
    if separator:
        raise UserError(
            f"The header of the prompt file has {separator!r} between its columns: save the file "
            "with commas."
        )
    if "" in header:
        raise UserError(
            f"Column {header.index('') + 1} of the prompt file has no name: expected one of "
            f"{', '.join(COLUMNS)}; name or remove it."
        )
    try:
        check_names(header, COLUMNS)
    except UserError as error:
        raise UserError(f"The header of the prompt file: {error}") from error
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"The header of the prompt file has {name!r} twice: remove one.")
    if "prompt" not in header:
        raise UserError("The header of the prompt file has no column prompt: add it.")


def _settings(values: dict[str, Any], folder: epath.Path) -> GenerationSettings:
    settings = GenerationSettings.read(values)
    if values.get("prompt") is None:
        raise UserError("prompt is missing: every row needs one.")
    if not settings.prompt.strip():
        raise UserError("prompt is empty: expected a text.")
    changes: dict[str, Any] = {}
    for name in FILES:
        paths = [_inside(folder, name, str(path)) for path in input_paths(settings, name)]
        if paths:
            changes[name] = tuple(paths) if name == "reference" else paths[0]
    return replace(settings, **changes)


def _inside(folder: epath.Path, name: str, text: str) -> epath.Path:
    """Return a path relative to the folder; raise `UserError` where it leads out of it."""
    path = folder / text
    out = os.path.isabs(text) or "://" in text or "\0" in text
    out = out or os.path.normpath(text).split(os.sep)[0] == os.pardir
    if not out and "://" not in str(folder):
        root = os.path.realpath(folder)
        out = os.path.commonpath([root, os.path.realpath(path)]) != root
    if out:
        raise UserError(
            f"{name} is {reprlib.repr(text)}, which leaves the folder of the prompt file: put it "
            "there."
        )
    return path
