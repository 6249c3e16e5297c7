"""From a record to what the model sees: square pixels of one size, and one caption."""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.source import Record
from jaxdiff.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """Crops the largest square, resizes it (antialiased) to `size`, and chooses a caption.

    `flip` mirrors half of the images; leave it off where captions tell left from right.
    `caption_dropout` is the share of captions replaced by "", which is what classifier-free
    guidance learns its unconditional model from. An encoded image of more than `max_pixels`
    pixels is not decoded.
    """

    size: int
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    caption_dropout: float = 0.1
    max_pixels: int = 64_000_000

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"data.transforms.size is {self.size}: expected at least one pixel.")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(
                f"data.transforms.caption_dropout is {self.caption_dropout}: "
                "expected a share from 0 to 1."
            )

    def __call__(
        self, record: Record, rng: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "h w c"], str]:
        """The image, uint8 [size, size, 3], and one caption of `record`.

        All chance comes from `rng`. Raises `RecordError` where either is unusable.
        """
        place, turn, choice, dropout = rng.random(4).tolist()  # drawn whatever is set, in one order
        try:
            caption = _caption(record["captions"], choice)
            image = self._image(record["image"], place, mirrored=self.flip and turn < 0.5)
        except RecordError as error:
            raise RecordError(f"{record['name']}: {error}") from error
        return image, "" if dropout < self.caption_dropout else caption

    def _image(
        self, data: np.ndarray | bytes, place: float, *, mirrored: bool
    ) -> UInt8[np.ndarray, "h w c"]:
        if isinstance(data, np.ndarray) and data.shape == (self.size, self.size, 3):
            pixels = data
        else:
            image = _from_pixels(data) if isinstance(data, np.ndarray) else self._decode(data)
            pixels = self._square(image, place)
        return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels

    def _square(self, image: Image.Image, place: float) -> UInt8[np.ndarray, "h w c"]:
        side = min(image.size)
        share = place if self.crop == "random" else 0.5
        left, top = (round(share * (length - side)) for length in image.size)
        box = (left, top, left + side, top + side)
        # Pillow widens the filter when it shrinks, so nothing aliases.
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box))

    def _decode(self, data: bytes) -> Image.Image:
        if not data:
            raise RecordError("the image is an empty file")
        try:
            with Image.open(io.BytesIO(data)) as image:  # reads the header alone
                width, height = image.size
                if width * height > self.max_pixels:
                    raise RecordError(
                        f"the image has {width} x {height} pixels, more than the "
                        f"{self.max_pixels} of data.transforms.max_pixels"
                    )
                # JPEG can decode at a half, a quarter or an eighth; twice what is needed
                # leaves the antialiasing to the resize.
                image.draft(None, (2 * self.size, 2 * self.size))
                return _rgb(ImageOps.exif_transpose(image))
        except RecordError:
            raise
        except UnidentifiedImageError as error:
            raise RecordError("the image cannot be decoded (it is of no known kind)") from error
        except Exception as error:  # Pillow's decoders raise whatever a broken file leads to
            raise RecordError(f"the image cannot be decoded ({error})") from error


def _caption(captions: list[str], choice: float) -> str:
    usable = [caption for caption in captions if caption.strip()]
    if not usable:
        raise RecordError("there is no caption")
    caption = usable[int(choice * len(usable))]
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise RecordError("the caption is not UTF-8") from error
    return caption


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise RecordError(f"its pixels are {pixels.dtype} {pixels.shape}, not uint8 [h, w, 3]")
    return Image.fromarray(pixels)


def _rgb(image: Image.Image) -> Image.Image:
    """Three channels: what is transparent shows white, and 16 bits are scaled to 8."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
