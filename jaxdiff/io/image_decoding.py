"""Decode images that users or other programs made: one decoder for all of them.

The rules, the same for training data, initial images, masks and metadata:

    formats       FORMATS; of animations and of files with several pages, the first image
    limits        on pixels, bytes, metadata, and the scans of a progressive JPEG
    values        8 bits per channel; v / 65535 of 16-bit grey becomes round(v / 257), and other
                  channels of 16 bits keep their higher byte. Signed integers, 32-bit integers,
                  floating point and CIE Lab are refused, as their range is unknown.
    colours       sRGB: colour profiles and gamma are ignored, as in diffusers
    orientation   that of EXIF or XMP; a damaged one is ignored
"""

import contextlib
import ctypes
import functools
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Pillow's names of the formats; JPEG includes MPO. Others may start processes or are obscure."""

LARGEST_FILE = 256 * 2**20
"""Bytes of a file."""

LARGEST_IMAGE = 8192 * 8192
"""Pixels."""

LARGEST_HEADER = 16 * 2**20
"""Bytes of what precedes the pixels: texts, profiles, thumbnails."""

MOST_READS = 10_000
"""Pieces of a header, such as chunks and blocks."""

MOST_LAYERS = 6
"""Channels of a TIFF that are stored apart."""

MOST_SCANS = 64
"""Passes over the pixels of a progressive JPEG; encoders write about 10."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPED = (5, 6, 7, 8)  # orientations that swap width and height
_EXIF_OF_PNG = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_REFUSED = {
    "I": "32-bit or signed integers, whose range is unknown",
    "F": "floating point, whose range is unknown",
    "LAB": "CIE Lab",
}
_PROGRESSIVE = re.compile(rb"\xff\xc2\0[\x0b\x11\x14]\x08")  # a frame, 8 bits (ITU T.81, B.2.2)
_SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e][\1-\4]")  # of 1 to 4 components (B.2.3)
_OPAQUE = ("CMYK", "YCbCr", "HSV", "RGBX")
_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class ImageError(Exception):
    """An image cannot be decoded; the message is the reason, for a sentence that names it."""


@contextlib.contextmanager
def open_image(data: bytes, largest: int = LARGEST_IMAGE) -> Iterator[ImageFile.ImageFile]:
    """Open an image file; its pixels are not decoded yet.

    Errors of Pillow become `ImageError`, here and in `upright`, and its warnings are not shown.

    Args:
      data: the file.
      largest: pixels that it may have.

    Raises:
      ImageError: the file is empty, damaged, of another format, or beyond a limit.
    """
    if not data:
        raise ImageError("it is an empty file")
    if len(data) > LARGEST_FILE:
        raise ImageError(f"it has more than {LARGEST_FILE} bytes")
    file = _LimitedReads(data)
    with without_warnings(), _errors():
        image = Image.open(file, formats=_formats())
        _check(image, data, largest)
        if image.format == "PNG":
            _scale_clear_colour(image, bits=data[24])
    file.reads = MOST_READS + len(data) // 64 + 4 * len(image.tile)
    file.bytes = sys.maxsize
    with image:
        yield image


def upright(image: Image.Image) -> Image.Image:
    """Decode an image, and return it upright and with 8 bits per channel, in mode RGB or RGBA.

    Args:
      image: of any mode, from `open_image` or made in memory.

    Raises:
      ImageError: it cannot be decoded, or its values have no known range.
    """
    with without_warnings(), _errors():
        image.load()
        if 0 in image.size:
            raise ImageError("it has no pixels")
        turn = _TURNS.get(_orientation(image))
        image = _eight_bits(image)
        return image if turn is None else image.transpose(turn)


def on_white(image: Image.Image) -> Image.Image:
    """Return an RGB image of an RGB or RGBA image, with white under transparency."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def upright_size(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int]:
    """Return width and height of an upright image, from its header.

    Args:
      image: from `open_image`, of `data`. A PNG is decoded if it has EXIF, which may be at its end.
      data: the file.
    """
    width, height = image.size
    if image.format == "PNG" and not any(key in data for key in _EXIF_OF_PNG):
        return width, height
    # Pillow swaps the sides of a TIFF by itself, and turns it while decoding.
    swapped = image.format != "TIFF" and _orientation(image) in _SWAPPED
    return (height, width) if swapped else (width, height)


class _LimitedReads(io.BytesIO):
    """A file that can be read only so often, and so much of it.

    Small files can otherwise keep decoders busy: with millions of empty chunks, or with blocks that
    are appended one by one. Decoders that take all of a file at once are not limited.
    """

    def __init__(self, data: bytes):
        super().__init__(data)
        self.reads, self.bytes = MOST_READS, LARGEST_HEADER

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if size is not None and size >= 0:
            self.reads, self.bytes = self.reads - 1, self.bytes - len(data)
            if self.reads < 0 or self.bytes < 0:
                raise ImageError("it has too much metadata, or is damaged")
        return data


def _check(image: ImageFile.ImageFile, data: bytes, largest: int) -> None:
    """Raise `ImageError` for an image that would take too much memory or time to decode."""
    width, height = image.size
    if width * height > largest:
        raise ImageError(f"it has {width} x {height} pixels, more than the {largest} allowed")
    progressive = "progressive" in image.info or (
        image.info.get("compression") == "jpeg" and _PROGRESSIVE.search(data)  # in a TIFF
    )
    if progressive and len(_SCAN.findall(data)) > MOST_SCANS:
        raise ImageError(f"it has more than {MOST_SCANS} scans")
    if any(tile.codec_name == "bmp_rle" for tile in image.tile):  # decoded in Python, byte by byte
        raise ImageError("it is a BMP with run-length encoding")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image)


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    width, height = image.size
    tags, tiles = image.tag_v2, [tile.extents or (0, 0, width, height) for tile in image.tile]
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in tiles)
    tile = tags.get(TiffImagePlugin.TILEWIDTH, 1) * tags.get(TiffImagePlugin.TILELENGTH, 1)
    if tile > LARGEST_IMAGE or covered > MOST_LAYERS * width * height:
        raise ImageError("its tiles are too large, or too many")
    if 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):
        raise ImageError(f"its values are {_REFUSED['I']}")


def _eight_bits(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode in _REFUSED:
        raise ImageError(f"its values are {_REFUSED[mode]}")
    if mode.startswith("I;16"):
        return _from_16_bits(image)
    if mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(mode.upper())
    clear = mode not in _OPAQUE and image.has_transparency_data
    wanted = "RGBA" if clear else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _from_16_bits(image: Image.Image) -> Image.Image:
    values, most, inverted = np.asarray(image), 65535, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        most = 2 ** image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
        inverted = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    levels = (np.arange(most + 1) * 255 + most // 2) // most
    levels = (255 - levels if inverted else levels).astype(np.uint8)
    grey = Image.fromarray(levels.take(values, mode="clip"))
    if "transparency" not in image.info:
        return grey.convert("RGB")
    opaque = Image.fromarray(np.uint8(255) * (values != image.info["transparency"]))
    return Image.merge("RGBA", (grey, grey, grey, opaque))


def _scale_clear_colour(image: Image.Image, bits: int) -> None:
    """Scale the transparent colour of a PNG as Pillow scales its pixels; it leaves that out."""
    clear = image.info.get("transparency")
    if image.mode == "L" and isinstance(clear, int):
        image.info["transparency"] = clear % 2**bits * 255 // (2**bits - 1)
    elif image.mode == "RGB" and bits == 16 and clear is not None:
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _orientation(image: Image.Image) -> int:
    try:
        with without_warnings():
            value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF, which Pillow's parser answers with many types
        return 1
    return value if isinstance(value, int) else 1


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    # Both write what is wrong with a file to stderr, besides the error that Pillow raises.
    logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
    for folder in ("../pillow.libs", ".dylibs"):
        for library in (Path(PIL.__file__).parent / folder).glob("libtiff*"):
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF came with Pillow 11.3


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn the errors of Pillow's decoders, which are of many types, to `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"its format is none of {', '.join(FORMATS)}, or it is damaged") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(f"it has more than {most} pixels") from error
    except Exception as error:
        raise ImageError(str(error) or type(error).__name__) from error


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Hide the warnings of Pillow; `warnings.catch_warnings` would not be safe in threads."""
    filters = cast(list[Any], warnings.filters)
    filters.insert(0, _WARNINGS)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            filters.remove(_WARNINGS)
