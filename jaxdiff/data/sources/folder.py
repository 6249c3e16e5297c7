"""A folder of images, in the Hugging Face layout or with a text file per image."""

import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from etils import epath

from jaxdiff.config.checked import checked
from jaxdiff.data.bad_records import (
    NO_CAPTION,
    NO_IMAGE,
    NO_REFERENCE,
    UNLISTED,
    LeftOut,
    RecordError,
    some,
)
from jaxdiff.data.files import (
    Inventory,
    image_suffixes,
    is_image,
    is_regular,
    is_unsupported_image,
    list_files,
    suffix_of,
)
from jaxdiff.data.sources.base import Record
from jaxdiff.data.sources.captions import LARGEST_CAPTIONS, captions_in, texts_of
from jaxdiff.data.sources.columns import check_column
from jaxdiff.data.sources.metadata import METADATA, Line, is_metadata, read_metadata
from jaxdiff.errors import UserError
from jaxdiff.io.files import reason
from jaxdiff.io.terminal import printable


class _Entry(NamedTuple):
    """One image, its captions or the name of their text file, and its reference images."""

    file: str
    captions: list[str] | str
    references: Sequence[str] = ()


class _Index(NamedTuple):
    entries: list[_Entry]
    left_out: LeftOut


@checked
@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images in the folder `path` (local or `gs://`) and below it.

    A `metadata.jsonl`, `.csv` or `.parquet` describes the images in its folder and below: each line
    names one (`file_name`, relative to the metadata's folder) and has its caption or list of
    captions under the key `caption`. If `reference` is set, the path of a reference image or a list
    of paths is under that key. An image in a folder without metadata has a `.txt` file of the same
    name with one caption per non-empty line. With a `prompt`, that is the caption of every image,
    and neither is read.

    Images without a caption or with a missing reference, captions without an image, images that the
    metadata of their folder do not name, and images of unsupported formats are left out
    (`left_out`). Hidden files are ignored.

    An unreadable image or caption raises `RecordError`, an unusable folder `UserError`.
    """

    path: str
    caption: str = "text"
    prompt: str | None = None
    reference: str | None = None

    def __len__(self) -> int:
        return len(self._index.entries)

    def __getitem__(self, index: int, /) -> Record:
        entry = self._index.entries[index]
        root = epath.Path(self.path)
        name, captions = printable(str(root / entry.file)), entry.captions
        try:
            image, *references = (_read(root / file) for file in (entry.file, *entry.references))
            if isinstance(captions, str):
                text = _read(root / captions, LARGEST_CAPTIONS + 1)
                file = printable(posixpath.basename(captions))
                captions = captions_in(text, f"its file of captions {file}")
        except RecordError as error:
            raise error.of(name) from error
        return {"image": image, "captions": captions, "name": name, "references": references}

    def identity(self, index: int) -> str:
        """Return the path of the image in the folder."""
        return self._index.entries[index].file

    def check(self) -> None:
        """Raise `UserError` if the folder is missing, empty or without captions.

        Checks that text files exist; they are read with their records.
        """
        _ = self._index

    @property
    def left_out(self) -> LeftOut:
        """The files of the folder that are no records."""
        return self._index.left_out

    @cached_property
    def _index(self) -> _Index:
        root = epath.Path(self.path)
        if not root.is_dir():
            raise UserError(
                f"The image folder {self.path} does not exist: "
                "set data.source.path to a folder of images."
            )
        listing = list_files(root)
        inventory = Inventory(listing, root)
        images = [file for file in listing.files if is_image(file)]
        if self.prompt is not None:
            entries = [_Entry(file, [self.prompt]) for file in images]
            inventory.claim(*images)
        else:
            folders = _metadata_files(listing.files)
            listed = [line for file in folders.values() for line in self._lines(root, file)]
            inventory.claim(*folders.values(), *(file for x in listed for file in x.references))
            if self.reference is not None:
                names = dict.fromkeys(key for line in listed for key in line.values)
                check_column(self.reference, names, key="reference", where=self.path)
            entries = self._listed(root, listed, set(listing.files), inventory)
            free = [file for file in listing.files if not _governed(file, folders)]
            entries += self._with_text_files(free, inventory)
            named = {name for line in listed for name in (line.file_name, *line.references)}
            for file in images:
                if _governed(file, folders) and file not in named:
                    inventory.reject(file, "no metadata of its folder name it", UNLISTED)
        left_out = inventory.left_out()
        if not entries:
            raise self._unusable(images, left_out)
        return _Index(entries, left_out)

    def _unusable(self, images: list[str], left_out: LeftOut) -> UserError:
        rejects = left_out.rejects
        if images and all(reject.kind in (NO_CAPTION, NO_IMAGE) for reject in rejects):
            return UserError(
                f"The images in {self.path} have no captions: write a {METADATA[0]} with the keys "
                f'"file_name" and "{self.caption}", or a .txt file for each image.'
            )
        found = f" (left out: {some(rejects)})" if rejects else ""
        return UserError(
            f"The folder {self.path} contains no images that can be used{found}: expected "
            f"{METADATA[0]}, or files ending in {image_suffixes()} with a .txt file each."
        )

    def _lines(self, root: epath.Path, file: str) -> list[Line]:
        """Return the lines of a metadata file, with names relative to the whole folder."""
        lines = read_metadata(root / file, self.caption, self.reference)
        if not lines:
            return []
        names = dict.fromkeys(key for line in lines for key in line.values)
        check_column(self.caption, names, key="caption", where=str(root / file))
        texts = (text for line in lines for text in texts_of(line.values.get(self.caption)))
        if not any(text.strip() for text in texts):
            raise UserError(
                f"All captions in {root / file} under {self.caption!r} are missing or empty: "
                "add some, or set data.source.caption to another key."
            )
        folder = posixpath.dirname(file)
        return [
            line._replace(
                file_name=posixpath.join(folder, line.file_name),
                references=[posixpath.join(folder, name) for name in line.references],
            )
            for line in lines
        ]

    def _listed(
        self, root: epath.Path, lines: list[Line], files: set[str], inventory: Inventory
    ) -> list[_Entry]:
        """Return the images that metadata name; each line is a record, or rejected."""
        entries = []
        alike = {}
        for line in lines:
            file = line.file_name
            if is_unsupported_image(file) and file in files:
                continue  # rejected with the files that are left
            # A hidden file is read if it is named.
            missing = [
                name
                for name in (file, *line.references)
                if name not in files and not is_regular(root / name)
            ]
            if not missing:
                captions = texts_of(line.values.get(self.caption))
                entries.append(_Entry(file, captions, line.references))
                inventory.claim(file)
                continue
            alike = alike or {_folded(name): name for name in files}
            near = alike.get(_folded(missing[0]))
            hint = f"; {near} does" if near else ""
            if missing[0] == file:
                why, kind = f"{line.where} names it but it does not exist{hint}", NO_IMAGE
            else:
                why = f"its reference image {printable(missing[0])} does not exist{hint}"
                kind = NO_REFERENCE
            inventory.reject(file, why, kind)
        return entries

    def _with_text_files(self, files: list[str], inventory: Inventory) -> list[_Entry]:
        """Return the images that have a text file of the same name."""
        texts: dict[str, str] = {}
        for file in sorted(files, reverse=True):  # of A.TXT and A.txt, the latter
            if suffix_of(file) == ".txt":
                texts[posixpath.splitext(file)[0]] = file
        entries, used = [], set()
        for file in files:
            stem = posixpath.splitext(file)[0]
            text = texts.get(stem)
            if is_unsupported_image(file):
                used.add(stem)  # rejected with the files that are left
            elif not is_image(file):
                continue
            elif text is None:
                inventory.reject(file, "it has no .txt file", NO_CAPTION)
            else:
                entries.append(_Entry(file, text))
                inventory.claim(file)
                used.add(stem)
        for stem, text in texts.items():
            if stem in used:
                inventory.claim(text)
            else:
                inventory.reject(text, "no image has its name", NO_IMAGE)
        return entries


def _read(file: epath.Path, largest: int = -1) -> bytes:
    """Return a file, or its first `largest` bytes."""
    try:
        with file.open("rb") as opened:
            return opened.read(largest)
    except (OSError, ValueError) as error:  # ValueError: an impossible path
        raise RecordError(f"{printable(file.name)} cannot be read ({reason(error)})") from error


def _metadata_files(files: list[str]) -> dict[str, str]:
    """Return the metadata file of each folder that has one.

    Raises:
      UserError: a folder has several.
    """
    found: dict[str, str] = {}
    for file in files:
        folder = posixpath.dirname(file)
        if is_metadata(file):
            if folder in found:
                raise UserError(
                    f"The images in {folder or 'the folder'} have both {found[folder]} and {file}: "
                    "expected one file of metadata; remove the other."
                )
            found[folder] = file
    return found


def _governed(file: str, folders: dict[str, str]) -> bool:
    """Whether there are metadata in the folder of a file, or in one above."""
    return bool(folders) and any(folder in folders for folder in _folders_above(file))


def _folders_above(file: str) -> Iterator[str]:
    while file:
        file = posixpath.dirname(file)
        yield file


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
