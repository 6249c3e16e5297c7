"""Transform records to model inputs: pixels of one size, a caption, and size and crop."""

import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int32, UInt8
from PIL import Image

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Fraction
from jaxdiff.data.bad_records import NO_CAPTION, NOT_TEXT, TOO_LARGE, RecordError
from jaxdiff.data.buckets import Buckets
from jaxdiff.data.sources.base import LatentRecord, Record
from jaxdiff.errors import UserError
from jaxdiff.io.image_decoding import (
    ImageError,
    on_white,
    open_image,
    upright,
    upright_size,
)
from jaxdiff.io.text import check_text


class Example(NamedTuple):
    """A transformed record.

    `size_crop` is height and width of the stored image; rows above and columns left of the crop, in
    pixels of the result; height and width of the result (Podell et al. 2023, section 2.2).
    """

    image: UInt8[np.ndarray, "h w c"]
    caption: str
    size_crop: Int32[np.ndarray, " 6"]


class View(NamedTuple):
    """One crop of an image, and its size_crop as in `Example`."""

    image: UInt8[np.ndarray, "h w c"]
    size_crop: Int32[np.ndarray, " 6"]


@checked
@dataclass(frozen=True, kw_only=True)
class Transforms:
    """Crop the largest square, resize it (antialiased) to `size`, and choose a caption.

    Attributes:
      size: side of the square, in pixels.
      buckets: crop to the shape of nearest aspect ratio instead.
      crop: position of the crop.
      flip: mirror half of the images; disable it if captions distinguish left from right.
      caption_dropout: fraction of captions replaced by "", for classifier-free guidance.
      max_pixels: larger encoded images are not decoded.
    """

    size: Count
    buckets: Buckets | None = None
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    caption_dropout: Fraction = 0.1
    max_pixels: Count = 64_000_000

    def __post_init__(self):
        if self.buckets is not None:
            self.buckets.check(self.size)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Possible heights and widths of results."""
        return [(self.size, self.size)] if self.buckets is None else self.buckets.shapes(self.size)

    def __call__(
        self, record: Record, rng: np.random.Generator, shape: tuple[int, int] | None = None
    ) -> Example:
        """Return an image of `shape`, by default the square, one caption, and the size_crop.

        Raises:
          RecordError: image or caption is unusable.
        """
        # The same random numbers are used for all settings.
        place, turn, choice, dropout = rng.random(4).tolist()
        try:
            caption = _caption(record["captions"], choice)
            mirrored = self.flip and turn < 0.5
            height, width = shape or (self.size, self.size)
            pixels, size = record["image"], (width, height)
            image, size_crop = self._image(pixels, place, size, mirrored=mirrored)
        except RecordError as error:
            raise error.of(record["name"]) from error
        return Example(image, "" if dropout < self.caption_dropout else caption, size_crop)

    def views(self, record: Record, count: int, shape: tuple[int, int]) -> list[View]:
        """Return crops of an image for a cache: evenly spaced if `crop` is "random".

        Every second one is mirrored if `flip` is set.

        Raises:
          RecordError: image or caption is unusable.
        """
        views, places = [], (count + 1) // 2 if self.flip else count
        height, width = shape
        try:
            _caption(record["captions"], 0.0)
            for i in range(count):
                mirrored, place = (i % 2 == 1, i // 2) if self.flip else (False, i)
                position = (place + 0.5) / places
                size = width, height
                image = self._image(record["image"], position, size, mirrored=mirrored)
                views.append(View(*image))
        except RecordError as error:
            raise error.of(record["name"]) from error
        return views

    def of_latents(
        self, record: LatentRecord, rng: np.random.Generator
    ) -> tuple[Float[np.ndarray, "h w c"], str, Int32[np.ndarray, " 6"]]:
        """Return the moments of one view, one caption, and the size_crop."""
        place, _, choice, dropout = rng.random(4).tolist()
        view = int(place * len(record["moments"]))
        try:
            caption = _caption(record["captions"], choice)
        except RecordError as error:
            raise error.of(record["name"]) from error
        caption = "" if dropout < self.caption_dropout else caption
        return record["moments"][view], caption, record["size_crop"][view]

    def _image(
        self, data: np.ndarray | bytes, place: float, size: tuple[int, int], *, mirrored: bool
    ) -> tuple[UInt8[np.ndarray, "h w c"], Int32[np.ndarray, " 6"]]:
        """Return pixels of this width and height, and the size_crop."""
        if isinstance(data, np.ndarray):
            image = _from_pixels(data)
            stored = image.size
        else:
            image, stored = self._decode(data, size)
        if isinstance(data, np.ndarray) and stored == size:
            pixels, cut = data, (0, 0)
        else:
            pixels, cut = self._fit(image, place, size)
        if mirrored:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
            scale = max(length / old for length, old in zip(size, stored, strict=True))
            cut = round(stored[0] * scale) - size[0] - cut[0], cut[1]
        size_crop = *stored[::-1], *cut[::-1], *size[::-1]
        return pixels, np.array(size_crop, np.int32)

    def _fit(
        self, image: Image.Image, place: float, size: tuple[int, int]
    ) -> tuple[UInt8[np.ndarray, "h w c"], tuple[int, int]]:
        """Return the largest crop, resized, and the pixels of the result to its left and above."""
        scale = max(length / old for length, old in zip(size, image.size, strict=True))
        sides = [length / scale for length in size]
        position = place if self.crop == "random" else 0.5
        left, top = (
            round(position * (old - side)) for old, side in zip(image.size, sides, strict=True)
        )
        right, bottom = (
            min(start + side, old)
            for start, side, old in zip((left, top), sides, image.size, strict=True)
        )
        # Pillow antialiases when it downsamples.
        fitted = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        return np.asarray(fitted), (round(left * scale), round(top * scale))

    def _decode(self, data: bytes, wanted: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
        """Return the upright image, and its stored width and height."""
        try:
            with open_image(data, largest=sys.maxsize) as image:
                width, height = image.size
                if width * height > self.max_pixels:
                    raise RecordError(
                        f"the image has {width} x {height} pixels, more than the "
                        f"{self.max_pixels} of data.transforms.max_pixels",
                        TOO_LARGE,
                    )
                stored = upright_size(image, data)
                # JPEG decodes at 1/2, 1/4 or 1/8 of its size; twice the result leaves the
                # antialiasing to the resize.
                image.draft(None, (2 * max(wanted), 2 * max(wanted)))
                return on_white(upright(image)), stored
        except ImageError as error:
            raise RecordError(f"the image cannot be decoded ({error})") from error


def stored_size(data: np.ndarray | bytes) -> tuple[int, int]:
    """Return width and height of a record's upright image; of a file, from its header.

    Raises:
      RecordError: the size cannot be read.
    """
    if isinstance(data, np.ndarray):
        return _from_pixels(data).size
    try:
        with open_image(data, largest=sys.maxsize) as image:
            return upright_size(image, data)
    except ImageError as error:
        raise RecordError(f"the image's size cannot be read ({error})") from error


def _caption(captions: list[str], choice: float) -> str:
    usable = [caption for caption in captions if caption.strip()]
    if not usable:
        raise RecordError("there is no caption", NO_CAPTION)
    try:
        for caption in usable:
            check_text(caption, "the caption")
    except UserError as error:
        raise RecordError(str(error), NOT_TEXT) from error
    return usable[int(choice * len(usable))]


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise RecordError(f"its pixels are {pixels.dtype} {pixels.shape}, not uint8 [h, w, 3]")
    return Image.fromarray(pixels)
