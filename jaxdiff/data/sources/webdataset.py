"""Captioned images in tar files, in the convention of WebDataset."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import NamedTuple

from etils import epath

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.files import data_files
from jaxdiff.data.sources.base import Record
from jaxdiff.data.sources.folder import is_image
from jaxdiff.errors import UserError


class _Part(NamedTuple):
    """Where a file lies in its archive."""

    suffix: str
    start: int
    size: int


class _Sample(NamedTuple):
    """The files of one key: those whose paths are the same up to the first dot of their name."""

    tar: int
    key: str
    image: _Part
    text: _Part | None


@dataclass(frozen=True, kw_only=True)
class WebDataset:
    """The samples of the tar file, glob or folder `path` (local or `gs://`).

    A sample is an image with, under the same name up to its first dot, a `.txt`, each non-empty
    line of which is a caption, or a `.json` whose key `caption` has one or a list of them. The
    headers are read once, to find where each file lies; records are then read where they are, and
    nothing is unpacked. For a run on many hosts make ArrayRecord of it first.
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
            raise RecordError(f"{name}: there is no .txt or .json of that name with a caption")
        try:
            with tar.open("rb") as file:
                file.seek(sample.image.start)
                image = file.read(sample.image.size)
                file.seek(sample.text.start)
                text = file.read(sample.text.size)
            captions = self._captions(sample.text.suffix, text)
        except (OSError, ValueError) as error:  # of UTF-8 or of JSON, too
            raise RecordError(f"{name}: {error}") from error
        return {"image": image, "captions": captions, "name": name}

    def check(self) -> None:
        """Raises `UserError` for tars that are missing, damaged, without images or captions."""
        if not any(sample.text for sample in self._samples):
            raise UserError(
                f"The tar files at {self.path} hold no captioned images: expected files such as "
                "0001.jpg with 0001.txt or 0001.json beside them."
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
    """Those that have an image, in the order of the archive."""
    parts: dict[str, dict[str, _Part]] = {}
    try:
        with tar.open("rb") as opened, tarfile.open(fileobj=opened, mode="r:") as archive:
            for member in archive:
                if member.isfile():  # no links, which may lead anywhere
                    path = _inside(member.name, tar)
                    stem, dot, rest = path.name.partition(".")
                    part = _Part(dot + rest, member.offset_data, member.size)
                    parts.setdefault(str(path.parent / stem), {})[part.suffix.lower()] = part
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{tar} cannot be read as a tar file ({error}): data.source.path must lead to whole "
            "tar files, not compressed ones, alone."
        ) from error
    for key, found in parts.items():
        images = [p for end, p in found.items() if end.count(".") == 1 and is_image(f"x{end}")]
        if images:
            yield _Sample(number, key, images[0], found.get(".txt") or found.get(".json"))


def _inside(name: str, tar: epath.Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{tar} holds {name!r}, a path that leads out of the archive: expected names inside "
            "it; do not trust that file."
        )
    return path
