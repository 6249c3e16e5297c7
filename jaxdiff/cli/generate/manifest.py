"""`manifest.jsonl`: the existing images of a prompt file, with their settings.

A line is a JSON object for one image: its `record`, which contains its `file`, then the `sha256` of
that file, the `seconds` that it took, for the best of several images the `chosen_seed`, and the
`unknown_words` of its prompt, if any, each with the nearest known ones. Lines are appended after
their files are written; a file without a complete line is generated again.

Each of several processes appends to its own `manifest.N.jsonl`. The first process merges them into
`manifest.jsonl` at the end, or when the command is started again.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.io.files import is_local, write_whole
from jaxdiff.io.text import format_json, parse_json

MANIFEST = "manifest.jsonl"

Record = dict[str, Any]

_RESULTS = ("sha256", "seconds", "chosen_seed", "unknown_words")
_PART = re.compile(r"manifest\.[0-9]+\.jsonl")


class Manifest:
    """The manifest of a folder, for one prompt file.

    Opening it in the first process drops lines of this prompt file whose image is no longer wanted,
    is missing or was changed, and lines of other prompt files whose image will be replaced. The
    other processes open it after the first one, which closes it last.

    Args:
      folder: of the images.
      source: name of the prompt file, in `record["prompts"]`.
      wanted: records of all images to generate, without their results.
      process: index of this process.
      processes: number of processes.
    """

    def __init__(
        self,
        folder: epath.Path,
        source: str,
        wanted: Sequence[Record],
        *,
        process: int = 0,
        processes: int = 1,
    ):
        self._folder, self._is_first = folder, process == 0
        own = MANIFEST if processes == 1 else f"manifest.{process}.jsonl"
        self._path = folder / own
        # A JSON round trip turns tuples into lists, as in the lines that are read.
        plain = {
            record["file"]: parse_json(format_json(record), record["file"]) for record in wanted
        }
        self._lines: dict[str, Record] = {}
        self._there: set[str] = set()
        for file, record in self._read_all().items():
            if file not in plain:
                if record.get("prompts") != source:
                    self._lines[file] = record
            elif self._is_whole(record, plain[file]):
                self._lines[file] = record
                self._there.add(file)
        if self._is_first:
            self._write_all()
        if processes > 1:
            self._lines = {}  # from now on those of this process alone

    def _parts(self) -> list[epath.Path]:
        """Return the manifests of single processes."""
        return sorted(p for p in self._folder.iterdir() if _PART.fullmatch(p.name))

    def _read_all(self) -> dict[str, Record]:
        files = [self._folder / MANIFEST, *self._parts()]
        return {name: line for file in files for name, line in _read(file).items()}

    def _write_all(self) -> None:
        _write(self._folder / MANIFEST, self._lines)
        for part in self._parts():
            part.unlink()

    def _is_whole(self, record: Record, wanted: Record) -> bool:
        """Return whether an image has the wanted record and its file is unchanged."""
        if {k: v for k, v in record.items() if k not in _RESULTS} != wanted:
            return False
        try:
            data = (self._folder / wanted["file"]).read_bytes()
        except OSError:
            return False
        return hashlib.sha256(data).hexdigest() == record.get("sha256")

    def has(self, file: str) -> bool:
        """Return whether an image existed, with the wanted record, at the start."""
        return file in self._there

    def add(self, record: Record, data: bytes, seconds: float, **more: Any) -> None:
        """Write the file of one image, then its line, with further results."""
        write_whole(self._folder / record["file"], data)
        digest = hashlib.sha256(data).hexdigest()
        results = {"sha256": digest, "seconds": round(seconds, 4), **more}
        self._lines[record["file"]] = record | results
        if not is_local(self._folder):  # object stores cannot append
            _write(self._path, self._lines)
        else:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(record | results))

    def close(self) -> None:
        """Merge the lines of all processes, ordered by row, if this is the first process."""
        if self._is_first:
            lines = self._read_all()
            self._lines = {line["file"]: line for line in sorted(lines.values(), key=_place)}
            self._write_all()


def _write(path: epath.Path, lines: dict[str, Record]) -> None:
    write_whole(path, "".join(map(_line, lines.values())).encode())


def _line(record: Record) -> str:
    return format_json(record, ascii=False) + "\n"


def _place(record: Record) -> tuple[str, int, int, str]:
    row, seed = (x if isinstance(x, int) else -1 for x in (record.get("row"), record.get("seed")))
    return str(record.get("prompts")), row, seed, record["file"]


def _read(path: epath.Path) -> dict[str, Record]:
    """Return the last record of each file; lines that cannot be parsed are ignored."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return {}
    records = {}
    for line in lines:
        try:
            record = parse_json(line, path)
        except UserError:
            continue
        if isinstance(record, dict) and isinstance(record.get("file"), str):
            records[record["file"]] = record
    return records
