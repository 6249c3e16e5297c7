"""`manifest.jsonl`: which images of a file of prompts are there, and what they were made of.

A line is one image, as a JSON object: the `record` of what it is made of, with the name of its
`file` in it, then the `sha256` of that file and the `seconds` that it took. A line is appended when
its file is there, so a file without a line, or a last line that was cut short, is drawn anew.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from jaxdiff.files import write_whole

MANIFEST = "manifest.jsonl"

Record = dict[str, Any]

_RESULTS = ("sha256", "seconds")


class Manifest:
    """The manifest of a folder, for one file of prompts.

    Opening it drops the lines of this file of prompts whose image is not wanted any more, is
    missing or was changed; lines of others stay unless their file is about to be replaced.

    Args:
      folder: of the images.
      source: name of the file of prompts; `record["prompts"]` says it.
      wanted: records of all images that there shall be, without their results.
    """

    def __init__(self, folder: epath.Path, source: str, wanted: Sequence[Record]):
        self._folder = folder
        self._path = folder / MANIFEST
        # As they will be read back, tuples having become lists.
        plain = {record["file"]: json.loads(json.dumps(record)) for record in wanted}
        self._lines: dict[str, Record] = {}
        self._there: set[str] = set()
        for file, record in _read(self._path).items():
            if file not in plain:
                if record.get("prompts") != source:
                    self._lines[file] = record
            elif self._is_whole(record, plain[file]):
                self._lines[file] = record
                self._there.add(file)
        self._write()

    def _is_whole(self, record: Record, wanted: Record) -> bool:
        """Whether an image is as wanted, and its file as it was written."""
        if {k: v for k, v in record.items() if k not in _RESULTS} != wanted:
            return False
        try:
            data = (self._folder / wanted["file"]).read_bytes()
        except OSError:
            return False
        return hashlib.sha256(data).hexdigest() == record.get("sha256")

    def has(self, file: str) -> bool:
        """Whether that image, as it is wanted, was there at the start."""
        return file in self._there

    def add(self, record: Record, data: bytes, seconds: float) -> None:
        """Writes the file of one image, then its line."""
        write_whole(self._folder / record["file"], data)
        results = {"sha256": hashlib.sha256(data).hexdigest(), "seconds": round(seconds, 4)}
        self._lines[record["file"]] = record | results
        if "://" in str(self._folder):  # a cloud's storage cannot append
            self._write()
        else:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(record | results))

    def close(self) -> None:
        """Brings the lines into the order of their rows, whatever order they were drawn in."""
        ordered = sorted(self._lines.values(), key=_place)
        self._lines = {record["file"]: record for record in ordered}
        self._write()

    def _write(self) -> None:
        write_whole(self._path, "".join(map(_line, self._lines.values())).encode())


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _place(record: Record) -> tuple[str, int, int, str]:
    row, seed = (x if isinstance(x, int) else -1 for x in (record.get("row"), record.get("seed")))
    return str(record.get("prompts")), row, seed, record["file"]


def _read(path: epath.Path) -> dict[str, Record]:
    """File to record, the last one of each; a line that cannot be read is none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return {}
    records = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # of JSON or of UTF-8
            continue
        if isinstance(record, dict) and isinstance(record.get("file"), str):
            records[record["file"]] = record
    return records
