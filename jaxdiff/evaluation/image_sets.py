"""Sets of images to score: a folder of files, an array, or the records of a data set."""

import dataclasses
import hashlib
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import UInt8

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.files import image_suffixes, is_image, list_files
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.transforms import Example
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import image_source
from jaxdiff.io.images import read_picture

Pixels = UInt8[np.ndarray, "h w 3"]


@runtime_checkable
class ImageSet(Protocol):
    """Images by index; `name` states where they are from."""

    @property
    def name(self) -> str:
        """Name of the set."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the images, to resume their features."""
        ...

    def __len__(self) -> int:
        """Return the number of images, unusable ones included."""
        ...

    def __getitem__(self, index: int, /) -> Pixels:
        """Return an image; `RecordError` if it is unusable and to be left out."""
        ...


_SAMPLE = re.compile(r"\d{4,}-.*|manifest\.jsonl")
_SHEET = re.compile(r"(grid(-\d+x\d+)?|strip|preview(\.\d+)?|interpolation)\.(png|webp)")


def without_sheets(files: Sequence[str]) -> list[str]:
    """Leave out the grids, strips and previews that `jaxdiff sample` writes beside its images."""
    split = [posixpath.split(file) for file in files]
    sampled = {folder for folder, name in split if _SAMPLE.fullmatch(name)}
    return [
        file
        for file, (folder, name) in zip(files, split, strict=True)
        if folder not in sampled or not _SHEET.fullmatch(name)
    ]


class ImageFiles:
    """The image files of a folder and below it, in the order of their names.

    Grids, strips and previews of `jaxdiff sample` are left out.

    Raises:
      UserError: there is no folder, or no image in it; and on access, an image is unreadable.
    """

    def __init__(self, folder: epath.PathLike):
        root = epath.Path(folder)
        if not root.is_dir():
            raise UserError(f"The folder {folder} does not exist: give a folder of images.")
        files = sorted(file for file in without_sheets(list_files(root).files) if is_image(file))
        if not files:
            raise UserError(
                f"The folder {folder} contains no images: expected files ending in "
                f"{image_suffixes()}; give another folder."
            )
        self.name, self._files = str(folder), [root / file for file in files]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int, /) -> Pixels:
        return read_picture(self._files[index])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and times of the files."""
        stats = [(file.name, file.stat()) for file in self._files]
        return _sha256([(name, stat.length, stat.mtime) for name, stat in stats])


class ImageArray:
    """Images of one size in memory."""

    def __init__(self, images: UInt8[np.ndarray, "n h w 3"], name: str):
        self.name, self._images = name, images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int, /) -> Pixels:
        return self._images[index]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the pixels."""
        return hashlib.sha256(np.ascontiguousarray(self._images).data).hexdigest()


class DataImages:
    """Images of a data set, as the model sees them but for random crops and flips.

    Args:
      data: of the recipe.
      samples: records, spread over the data; None takes all.
    """

    def __init__(self, data: DataConfig, samples: int | None = None):
        self._source = image_source(data)
        self._source.check()
        self._transforms = dataclasses.replace(
            data.transforms, buckets=None, crop="center", flip=False, caption_dropout=0.0
        )
        self._count = min(samples or len(self._source), len(self._source))
        self.name = type(self._source).__name__

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Pixels:
        return self.example(index).image

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the source's fields and the transforms; files may not change meanwhile."""
        return _sha256([self._source, len(self._source), self._count, self._transforms])

    def example(self, index: int) -> Example:
        """Return the image and a caption.

        Raises:
          RecordError: the record is unusable.
        """
        record = self._source[index * len(self._source) // self._count]
        return self._transforms(record, np.random.default_rng(index))

    def examples(self) -> Iterator[Example]:
        """Yield image and caption of each usable record."""
        for index in range(len(self)):
            try:
                example = self.example(index)
            except RecordError:
                continue
            yield example

    def captions(self) -> list[str]:
        """Return a caption of each usable record."""
        return [example.caption for example in self.examples()]


def _sha256(parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
