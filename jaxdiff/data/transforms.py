"""From a record to what the model sees: square pixels of one size, a caption, what was cut off."""

import io
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.source import Record
from jaxdiff.errors import UserError

_LYING = (5, 6, 7, 8)  # EXIF's orientations whose rows are columns


class Example(NamedTuple):
    """What one record became.

    `framing` is the height and width of the image as it was stored; the rows above and columns to
    the left that the crop cut off, in pixels of the result; and the height and width of the result
    (Podell et al. 2023, section 2.2).
    """

    image: UInt8[np.ndarray, "h w c"]
    caption: str
    framing: Int32[np.ndarray, " 6"]


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

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        """The image, uint8 [size, size, 3], one caption of `record`, and the framing.

        All chance comes from `rng`. Raises `RecordError` where either is unusable.
        """
        place, turn, choice, dropout = rng.random(4).tolist()  # drawn whatever is set, in one order
        try:
            caption = _caption(record["captions"], choice)
            mirrored = self.flip and turn < 0.5
            image, framing = self._image(record["image"], place, mirrored=mirrored)
        except RecordError as error:
            raise RecordError(f"{record['name']}: {error}") from error
        return Example(image, "" if dropout < self.caption_dropout else caption, framing)

    def _image(
        self, data: np.ndarray | bytes, place: float, *, mirrored: bool
    ) -> tuple[UInt8[np.ndarray, "h w c"], Int32[np.ndarray, " 6"]]:
        if isinstance(data, np.ndarray) and data.shape == (self.size, self.size, 3):
            pixels, stored, cut = data, (self.size, self.size), (0, 0)
        else:
            if isinstance(data, np.ndarray):
                image = _from_pixels(data)
                stored = image.size
            else:
                image, stored = self._decode(data)
            pixels, cut = self._square(image, place)
        if mirrored:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
            length = max(stored[0] * self.size / min(stored), self.size)
            cut = round(length) - self.size - cut[0], cut[1]
        framing = *stored[::-1], *cut[::-1], self.size, self.size
        return pixels, np.array(framing, np.int32)

    def _square(
        self, image: Image.Image, place: float
    ) -> tuple[UInt8[np.ndarray, "h w c"], tuple[int, int]]:
        """The square, and how much of the result's pixels lie to its left and above it."""
        side = min(image.size)
        share = place if self.crop == "random" else 0.5
        left, top = (round(share * (length - side)) for length in image.size)
        box = (left, top, left + side, top + side)
        # Pillow widens the filter when it shrinks, so nothing aliases.
        square = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        scale = self.size / side
        return np.asarray(square), (round(left * scale), round(top * scale))

    def _decode(self, data: bytes) -> tuple[Image.Image, tuple[int, int]]:
        """The image, upright, and its width and height as stored."""
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
                if image.getexif().get(ExifTags.Base.Orientation) in _LYING:
                    width, height = height, width
                return _rgb(ImageOps.exif_transpose(image)), (width, height)
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
