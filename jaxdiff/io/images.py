"""Image files: grids, denoising strips, animations, and PNG files with text metadata."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from jaxdiff.errors import UserError
from jaxdiff.io.files import read_bytes, write_whole
from jaxdiff.io.image_decoding import LARGEST_FILE, ImageError, on_white, open_image, upright

GAP = 2  # pixels between tiles
GAP_COLOUR = 224
INK_COLOUR = 32
LARGEST_GRID = 400  # images; more are too small to see on any screen
ENLARGED_SIDE = 256  # of images that a grid shows enlarged
NARROWEST_CAPTION = 48  # pixels
FAINT = 16  # opacity, of 255, below which colours of a mask are not compared
SAME_LEVEL = 8  # of 255; lossy formats change levels by so much

Images = UInt8[np.ndarray, "n h w 3"]
Picture = UInt8[np.ndarray, "height width 3"]
Mask = Float32[np.ndarray, "height width"]


def to_uint8(images: Float[Array, "..."] | Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Convert [-1, 1] to 0 .. 255, rounded and clipped; NaN becomes 0."""
    levels = (np.asarray(images, np.float32) + 1) * 127.5
    return np.nan_to_num(levels, nan=0).clip(0, 255).round().astype(np.uint8)


def grid(
    images: Images,
    columns: int | None = None,
    scale: int = 1,
    *,
    captions: Sequence[str] | None = None,
) -> Picture:
    """Tile images row by row, with thin light gaps.

    Args:
      images: at least one.
      columns: images per row; None makes the grid about square.
      scale: integer upscaling factor (nearest neighbour).
      captions: one text per image, written below it and wrapped to its width. Pillow's default
        font shows boxes for letters outside ASCII.

    Raises:
      ValueError: the number of captions differs from the number of images.
    """
    n, height, width = len(images), images.shape[1] * scale, images.shape[2] * scale
    if captions is not None and len(captions) != n:
        raise ValueError(f"{len(captions)} captions for {n} images")
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)

    font = ImageFont.load_default(size=max(10, width // 14))
    texts = [_wrap(caption, font, width) for caption in captions or [""] * n]
    line = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 11
    below = [line * max(map(len, texts[r * columns : (r + 1) * columns])) for r in range(rows)]

    tops = [GAP + sum(below[:r]) + r * (height + GAP) for r in range(rows + 1)]
    size = columns * (width + GAP) + GAP, tops[-1]
    canvas = Image.new("RGB", size, (GAP_COLOUR,) * 3)
    pen = ImageDraw.Draw(canvas)
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        left, top = GAP + i % columns * (width + GAP), tops[i // columns]
        canvas.paste(Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)), (left, top))
        for j, text in enumerate(lines):
            pen.text((left, top + height + j * line), text, (INK_COLOUR,) * 3, font)
    return np.asarray(canvas)


def prompt_grid(images: Images, prompts: Sequence[str], scale: int = 1) -> Picture:
    """Tile images as `grid` does, with their prompts below unless they are too narrow for text."""
    captions = prompts if images.shape[2] >= NARROWEST_CAPTION else None
    return grid(images, captions=captions, scale=scale)


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels; longer words are split."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def strip(
    snapshots: UInt8[np.ndarray, "k h w 3"] | UInt8[np.ndarray, "k n h w 3"], scale: int = 1
) -> Picture:
    """Tile k denoising snapshots from left to right, one row per image."""
    if snapshots.ndim == 4:
        snapshots = snapshots[:, None]
    k, _, h, w, _ = snapshots.shape
    return grid(snapshots.swapaxes(0, 1).reshape(-1, h, w, 3), columns=k, scale=scale)


def save_png(path: epath.PathLike, image: Picture, text: dict[str, str] | None = None) -> None:
    """Write a PNG file atomically, creating its folder, with `text` in its text chunks."""
    write_whole(epath.Path(path), png_bytes(image, text))


def png_bytes(image: Picture, text: dict[str, str] | None = None) -> bytes:
    """Encode a PNG file with `text` in its text chunks.

    A Latin-1 value becomes a tEXt chunk, any other an iTXt chunk in UTF-8 (PNG specification,
    sections 11.3.3.2 and 11.3.3.4). Keys are 1 to 79 characters of Latin-1.
    """
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="PNG", pnginfo=chunks)
    return data.getvalue()


def animation_bytes(
    frames: Images,
    kind: Literal["gif", "webp"] = "gif",
    *,
    seconds: float = 0.1,
    ping_pong: bool = True,
    scale: int = 1,
) -> bytes:
    """Encode an animated GIF or WebP file that loops forever.

    Args:
      frames: at least one. A GIF frame has 256 colours.
      kind: file format.
      seconds: time per frame; a GIF rounds to hundredths, a WebP to thousandths.
      ping_pong: append the frames between the ends in reverse order, for a smooth loop.
      scale: integer upscaling factor (nearest neighbour).

    Raises:
      UserError: no frames, or less than 0.01 seconds.
    """
    if len(frames) == 0 or not seconds >= 0.01:
        raise UserError(
            f"An animation of {len(frames)} frames of {seconds} seconds cannot be written: "
            "expected at least one frame and at least 0.01 seconds."
        )
    if ping_pong:
        frames = np.concatenate([frames, frames[-2:0:-1]])
    first, *rest = (Image.fromarray(x.repeat(scale, 0).repeat(scale, 1)) for x in frames)
    data = io.BytesIO()
    first.save(
        data,
        format=kind.upper(),
        save_all=True,
        append_images=rest,
        duration=round(seconds * 1000),
        loop=0,
        lossless=True,  # WebP only
    )
    return data.getvalue()


def read_picture(path: epath.PathLike, data: bytes | None = None) -> Picture:
    """Read an image file, or its `data`, by the rules of `io/image_decoding.py`, upright.

    White is put under transparency.

    Raises:
      UserError: the file is missing, not an image, or refused by those rules.
    """
    return _read(path, data, picture_of)


def read_mask(path: epath.PathLike, data: bytes | None = None) -> Mask:
    """Read an image file, or its `data`, as a mask: 0 where an image is kept, 1 where replaced.

    `mask_of` says how.

    Raises:
      UserError: as `read_picture`, or its transparency contradicts its brightness.
    """
    return _read(path, data, mask_of)


def read_image_file(path: epath.PathLike) -> bytes:
    """Read the bytes of an image file.

    Raises:
      UserError: it cannot be read, or is too large.
    """
    return read_bytes(path, "the path of an image", largest=LARGEST_FILE)


def _read(path: epath.PathLike, data: bytes | None, convert: Callable[[Image.Image], Any]) -> Any:
    data = read_image_file(path) if data is None else data
    try:
        with open_image(data) as image:
            return convert(image)
    except ImageError as error:
        raise UserError(
            f"{path} is not a readable image ({error}): give the path of one."
        ) from error


def picture_of(image: Image.Image) -> Picture:
    """Return the pixels of a Pillow image of any mode, upright, with white under transparency.

    Raises:
      ImageError: it is refused by the rules of `io/image_decoding.py`.
    """
    return np.asarray(on_white(upright(image)))


def mask_of(image: Image.Image) -> Mask:
    """Return the mask that a Pillow image of any mode means, upright.

    Opacity is the mask of an image with transparency, in which brightness is that of one colour or
    equals opacity. Otherwise brightness (Rec. 601) is: black keeps, and white replaces.

    Raises:
      ImageError: as `picture_of`, or transparency is uniform, or contradicts brightness.
    """
    image = upright(image)
    brightness = np.asarray(image.convert("L"))
    opacity = np.asarray(image.getchannel("A")) if image.mode == "RGBA" else None
    if opacity is None or opacity.min() == 255:
        return brightness / np.float32(255)
    if opacity.min() == opacity.max():
        raise ImageError("it is equally transparent everywhere, and so no mask")
    visible = brightness[opacity >= FAINT]
    difference = np.maximum(brightness, opacity) - np.minimum(brightness, opacity)
    if difference.max() > SAME_LEVEL and visible.size and np.ptp(visible) > SAME_LEVEL:
        raise ImageError("its transparency contradicts its brightness, and either may be the mask")
    return opacity / np.float32(255)
