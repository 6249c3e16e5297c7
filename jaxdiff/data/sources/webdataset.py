"""Captioned images in tar files, in the WebDataset format."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import NamedTuple

from etils import epath

from jaxdiff.config.checked import checked
from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.files import data_files
from jaxdiff.data.sources.base import Record
from jaxdiff.data.sources.folder import is_image
from jaxdiff.errors import UserError


class _Member(NamedTuple):
    """The position of a file in its archive."""

    suffix: str
    start: int
    size: int


class _Sample(NamedTuple):
    """The files of one key: the path up to the first dot of the file's name."""

    tar: int
    key: str
    image: _Member
    text: _Member | None


@checked
@dataclass(frozen=True, kw_only=True)
class WebDataset:
    """The samples of the tar file, glob or folder `path` (local or `gs://`).

    A sample is an image and, with the same name up to the first dot, a `.txt` file with one caption
    per non-empty line, or a `.json` file with a caption or a list of captions under the key
    `caption`. Headers are read once to index the archives; records are read in place, without
    unpacking. For runs on many hosts, convert to ArrayRecord first.
    """

    path: str
    caption: str = "caption"

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int, /) -> Record:
        sample = self._samples[index]
        tar = self._tars[sample.tar]
        name = f"{tar}/{sample.key}{sample.image.suffix}"
        if sample.text is None:
            raise RecordError(f"{name}: it has no .txt or .json file with a caption")
        try:
            with tar.open("rb") as file:
                file.seek(sample.image.start)
                image = file.read(sample.image.size)
                file.seek(sample.text.start)
                text = file.read(sample.text.size)
            captions = self._captions(sample.text.suffix, text)
        except (OSError, ValueError) as error:  # ValueError: invalid UTF-8 or JSON
            raise RecordError(f"{name}: {error}") from error
        return {"image": image, "captions": captions, "name": name}

    def check(self) -> None:
        """Raise `UserError` if the tar files are missing, damaged, or without captioned images."""
        if not any(sample.text for sample in self._samples):
            raise UserError(
                f"The tar files at {self.path} contain no captioned images: expected files such as "
                "0001.jpg together with 0001.txt or 0001.json."
            )

    def _captions(self, suffix: str, text: bytes) -> list[str]:
        if suffix == ".txt":
            return [line.strip() for line in text.decode().splitlines()]
        values = json.loads(text)
        value = values.get(self.caption) if isinstance(values, dict) else None
        return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]

    @cached_property
    def _tars(self) -> list[epath.Path]:
        return data_files(self.path, lambda name: name.endswith(".tar"), "tar file")

    @cached_property
    def _samples(self) -> list[_Sample]:
        return [s for number, tar in enumerate(self._tars) for s in _samples(number, tar)]


def _samples(number: int, tar: epath.Path) -> Iterator[_Sample]:
    """Yield the samples of a tar file that have an image, in archive order."""
    members: dict[str, dict[str, _Member]] = {}
    try:
        with tar.open("rb") as opened, tarfile.open(fileobj=opened, mode="r:") as archive:
            for member in archive:
                if member.isfile():  # no links, which may point outside
                    path = _inside(member.name, tar)
                    stem, dot, rest = path.name.partition(".")
                    key, suffix = str(path.parent / stem), dot + rest
                    found = _Member(suffix, member.offset_data, member.size)
                    members.setdefault(key, {})[suffix.lower()] = found
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{tar} cannot be read as a tar file ({error}): data.source.path must select complete, "
            "uncompressed tar files only."
        ) from error
    for key, files in members.items():
        images = [m for end, m in files.items() if end.count(".") == 1 and is_image(f"x{end}")]
        if images:
            yield _Sample(number, key, images[0], files.get(".txt") or files.get(".json"))


def _inside(name: str, tar: epath.Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{tar} contains {name!r}, a path outside the archive: expected relative paths "
            "without '..'; do not use this file."
        )
    return path
