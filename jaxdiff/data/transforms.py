"""Transform records to model inputs: pixels of one size, a caption, and size and crop."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int32, UInt8
from PIL import Image

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Fraction, Natural
from jaxdiff.data.bad_records import (
    MANY_REFERENCES,
    NO_CAPTION,
    NOT_TEXT,
    TOO_LARGE,
    RecordError,
)
from jaxdiff.data.buckets import Buckets
from jaxdiff.data.sources.base import LatentRecord, Record, images_of
from jaxdiff.errors import UserError
from jaxdiff.io.image_decoding import (
    ImageError,
    on_white,
    open_image,
    upright,
    upright_size,
)
from jaxdiff.io.text import check_text

T = TypeVar("T")


class Example(NamedTuple):
    """A transformed record: pixels of image and references, or moments of their latents.

    `size_crop` is height and width of the stored image; rows above and columns left of the crop, in
    pixels of the result; height and width of the result (Podell et al. 2023, section 2.2).
    """

    image: UInt8[np.ndarray, "h w c"] | Float[np.ndarray, "h w c"]
    caption: str
    size_crop: Int32[np.ndarray, " 6"]
    references: Sequence[np.ndarray] = ()


class View(NamedTuple):
    """One crop of an image and of its references, and its size_crop as in `Example`."""

    image: UInt8[np.ndarray, "h w c"]
    size_crop: Int32[np.ndarray, " 6"]
    references: Sequence[UInt8[np.ndarray, "_ _ c"]] = ()


@checked
@dataclass(frozen=True, kw_only=True)
class Transforms:
    """Crop the largest square, resize it (antialiased) to `size`, and choose a caption.

    References are cropped at the image's place and mirrored with it, each to a shape of its own.

    Attributes:
      size: side of the square, in pixels.
      buckets: crop to the shape of nearest aspect ratio instead.
      crop: position of the crop.
      flip: mirror half of the images; disable it if captions distinguish left from right.
      caption_dropout: fraction of captions replaced by "", for classifier-free guidance.
      max_pixels: larger encoded images are not decoded.
      references: most reference images of a record; records with more are left out.
    """

    size: Count
    buckets: Buckets | None = None
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    caption_dropout: Fraction = 0.1
    max_pixels: Count = 64_000_000
    references: Natural = 0

    def __post_init__(self):
        if self.buckets is not None:
            self.buckets.check(self.size)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Possible heights and widths of results."""
        return [(self.size, self.size)] if self.buckets is None else self.buckets.shapes(self.size)

    def __call__(
        self,
        record: Record,
        rng: np.random.Generator,
        shapes: Sequence[tuple[int, int]] | None = None,
    ) -> Example:
        """Return image and references of `shapes`, by default squares, and one caption.

        Raises:
          RecordError: image, caption or a reference is unusable.
        """
        # The same random numbers are used for all settings.
        place, turn, choice, dropout = rng.random(4).tolist()
        try:
            caption = _caption(record["captions"], choice)
            view = self._view(record, place, shapes, mirrored=self.flip and turn < 0.5)
        except RecordError as error:
            raise error.of(record["name"]) from error
        caption = "" if dropout < self.caption_dropout else caption
        return Example(view.image, caption, view.size_crop, view.references)

    def views(
        self, record: Record, count: int, shapes: Sequence[tuple[int, int]] | None = None
    ) -> list[View]:
        """Return crops of image and references for a cache: evenly spaced if `crop` is "random".

        Every second one is mirrored if `flip` is set.

        Raises:
          RecordError: image, caption or a reference is unusable.
        """
        views, places = [], (count + 1) // 2 if self.flip else count
        try:
            _caption(record["captions"], 0.0)
            for i in range(count):
                mirrored, place = (i % 2 == 1, i // 2) if self.flip else (False, i)
                position = (place + 0.5) / places
                views.append(self._view(record, position, shapes, mirrored=mirrored))
        except RecordError as error:
            raise error.of(record["name"]) from error
        return views

    def of_latents(self, record: LatentRecord, rng: np.random.Generator) -> Example:
        """Return the moments of one view, one caption, and the size_crop."""
        place, _, choice, dropout = rng.random(4).tolist()
        view = int(place * len(record["moments"]))
        references = record.get("references", [])
        try:
            caption = _caption(record["captions"], choice)
            self._check_references(len(references))
        except RecordError as error:
            raise error.of(record["name"]) from error
        caption = "" if dropout < self.caption_dropout else caption
        moments, size_crop = record["moments"][view], record["size_crop"][view]
        return Example(moments, caption, size_crop, [x[view] for x in references])

    def _view(
        self,
        record: Record,
        place: float,
        shapes: Sequence[tuple[int, int]] | None,
        *,
        mirrored: bool,
    ) -> View:
        """Return one crop of an image and of its references."""
        count = len(images_of(record))
        self._check_references(count - 1)
        if shapes is None:
            shapes = [(self.size, self.size)] * count
        elif len(shapes) != count:
            raise RecordError("its reference images changed since their sizes were read")

        def crop(i: int, data: np.ndarray | bytes) -> tuple[np.ndarray, np.ndarray]:
            height, width = shapes[i]
            return self._image(data, place, (width, height), mirrored=mirrored)

        (image, size_crop), *references = _of_images(record, crop)
        return View(image, size_crop, [pixels for pixels, _ in references])

    def _check_references(self, count: int) -> None:
        if count > self.references:
            raise RecordError(
                f"it has {count} reference image{'s' * (count > 1)}, more than the "
                f"{self.references} of data.transforms.references",
                MANY_REFERENCES,
            )

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


def stored_sizes(record: Record) -> list[tuple[int, int]]:
    """Return width and height of the image of a record and of each reference, as `stored_size`."""
    return _of_images(record, lambda _, data: stored_size(data))


def _of_images(record: Record, result: Callable[[int, np.ndarray | bytes], T]) -> list[T]:
    """Return results for the image of a record and each reference, which errors name."""
    results = []
    for i, data in enumerate(images_of(record)):
        try:
            results.append(result(i, data))
        except RecordError as error:
            part = error.within(f"reference image {i}") if i else error
            raise part.of(record["name"]) from error
    return results


def stored_size(data: np.ndarray | bytes) -> tuple[int, int]:
    """Return width and height of an upright image; of a file, from its header.

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
