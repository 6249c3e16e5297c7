"""A folder of images, in the Hugging Face layout or with a text file per image."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from etils import epath

from jaxdiff.config.checked import checked
from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.files import files_below
from jaxdiff.data.sources.base import Record
from jaxdiff.data.sources.columns import check_column
from jaxdiff.errors import UserError

_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_METADATA = "metadata.jsonl"


class _Entry(NamedTuple):
    """One image; `captions` is None where they are in its text file."""

    file: str
    captions: list[str] | None


@checked
@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images in the folder `path` (local or `gs://`) and below it.

    With a `metadata.jsonl`, each line names an image (`file_name`, relative to the folder) and has
    its caption or list of captions under the key `caption`. Otherwise each image has a `.txt` file
    of the same name with one caption per non-empty line. With a `prompt`, that is the caption of
    every image, and neither is read.

    An unreadable image or caption raises `RecordError`, an unusable folder `UserError`.
    """

    path: str
    caption: str = "text"
    prompt: str | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int, /) -> Record:
        entry = self._entries[index]
        file = epath.Path(self.path) / entry.file
        try:
            image = file.read_bytes()
            captions = entry.captions
            if captions is None:
                text = file.with_suffix(".txt").read_bytes().decode()
                captions = [line.strip() for line in text.splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(f"{file}: {error}") from error
        return {"image": image, "captions": captions, "name": str(file)}

    def check(self) -> None:
        """Raise `UserError` if the folder is missing, empty or without captions.

        Checks that text files exist; they are read with their records.
        """
        _ = self._entries

    @cached_property
    def _entries(self) -> list[_Entry]:
        root = epath.Path(self.path)
        if not root.is_dir():
            raise UserError(
                f"The image folder {self.path} does not exist: "
                "set data.source.path to a folder of images."
            )
        if self.prompt is not None:
            images = sorted(f for f in files_below(root) if is_image(f))
            entries = [_Entry(file, [self.prompt]) for file in images]
        elif (root / _METADATA).exists():
            entries = self._listed(root / _METADATA)
            self._check_files(root, entries)
        else:
            entries = self._with_text_files(root)
        if not entries:
            raise UserError(
                f"The folder {self.path} contains no images: expected {_METADATA}, "
                f"or files ending in {', '.join(sorted(_IMAGES))} with a .txt file each."
            )
        return entries

    def _listed(self, metadata: epath.Path) -> list[_Entry]:
        rows = list(self._rows(metadata))
        if rows:
            check_column(
                self.caption,
                dict.fromkeys(key for row in rows for key in row),
                key="caption",
                where=str(metadata),
            )
        entries = [_Entry(row["file_name"], _texts(row.get(self.caption))) for row in rows]
        if rows and not any(text.strip() for entry in entries for text in entry.captions or ()):
            raise UserError(
                f"All captions in {metadata} under {self.caption!r} are missing or empty: "
                "add some, or set data.source.caption to another key."
            )
        return entries

    def _rows(self, metadata: epath.Path) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(metadata.read_bytes().splitlines(), start=1):
            where = f"Line {number} of {metadata}"
            if not line.strip():
                continue
            try:
                # A caption that is not UTF-8 invalidates its own record, not the whole file.
                row = json.loads(line.decode(errors="surrogateescape"))
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not JSON ({error}): correct that line.") from error
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise UserError(
                    f'{where} does not name an image: expected {{"file_name": "...", '
                    f'"{self.caption}": "..."}}; correct that line.'
                )
            yield {**row, "file_name": _inside(row["file_name"], where)}

    def _check_files(self, root: epath.Path, entries: list[_Entry]) -> None:
        folders = {str(PurePosixPath(entry.file).parent) for entry in entries}
        there = {
            str(PurePosixPath(folder) / file.name)
            for folder in folders
            if (root / folder).is_dir()
            for file in (root / folder).iterdir()  # one listing is cheaper than many stats
        }
        missing = [entry.file for entry in entries if entry.file not in there]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(entries)} files named by {_METADATA} in {self.path} "
                f"do not exist, among them {', '.join(missing[:3])}: "
                "add them, or remove their lines."
            )

    def _with_text_files(self, root: epath.Path) -> list[_Entry]:
        files = set(files_below(root))
        images = sorted(f for f in files if is_image(f))
        if images and not any(str(PurePosixPath(f).with_suffix(".txt")) in files for f in images):
            raise UserError(
                f"The images in {self.path} have no captions: write a {_METADATA} with the keys "
                f'"file_name" and "{self.caption}", or a .txt file for each image.'
            )
        return [_Entry(file, None) for file in images]


def is_image(file: str) -> bool:
    """Whether a file's name has the suffix of an image."""
    return PurePosixPath(file).suffix.lower() in _IMAGES


def _texts(value: Any) -> list[str]:
    """Return the captions in a metadata value: a string, a list, or None."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _inside(file_name: str, where: str) -> str:
    """Normalise `file_name`; raise `UserError` if it is outside the folder."""
    path = PurePosixPath(file_name)
    # Windows drives and UNC names count as absolute on every platform.
    absolute = path.is_absolute() or PureWindowsPath(file_name).anchor or "://" in file_name
    if absolute or ".." in path.parts or ".." in PureWindowsPath(file_name).parts:
        raise UserError(
            f"{where} names {file_name!r}, which is outside the folder: "
            "file_name must be relative to the folder and stay inside it."
        )
    return str(path)
