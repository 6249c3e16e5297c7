"""Pictures of results: grids, strips of a denoising, and PNG files that say how they were made."""

import io
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole

GAP = 2  # pixels between tiles
GAP_COLOUR = 224
INK_COLOUR = 32

Images = UInt8[np.ndarray, "n h w 3"]
Picture = UInt8[np.ndarray, "height width 3"]


def to_uint8(images: Float[Array, "..."] | Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """From [-1, 1] to 0 .. 255, rounded; values outside are clipped, and NaN becomes 0."""
    levels = (np.asarray(images, np.float32) + 1) * 127.5
    return np.nan_to_num(levels, nan=0).clip(0, 255).round().astype(np.uint8)


def grid(
    images: Images,
    columns: int | None = None,
    scale: int = 1,
    *,
    captions: Sequence[str] | None = None,
) -> Picture:
    """Images side by side, row after row, with thin light gaps.

    Args:
      images: at least one.
      columns: images in a row; None makes the grid about square.
      scale: each pixel becomes a square of this side.
      captions: one text for each image, written under it and wrapped to its width. Pillow's
        default font draws boxes for letters outside ASCII.

    Raises:
      ValueError: there are not as many captions as images.
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
    draw = ImageDraw.Draw(canvas)
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        left, top = GAP + i % columns * (width + GAP), tops[i // columns]
        canvas.paste(Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)), (left, top))
        for j, text in enumerate(lines):
            draw.text((left, top + height + j * line), text, (INK_COLOUR,) * 3, font)
    return np.asarray(canvas)


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a word that is longer is cut."""
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
    """Images at k points of their denoising, from left to right; a row for each of n images."""
    if snapshots.ndim == 4:
        snapshots = snapshots[:, None]
    k, _, h, w, _ = snapshots.shape
    return grid(snapshots.swapaxes(0, 1).reshape(-1, h, w, 3), columns=k, scale=scale)


def save_png(path: epath.PathLike, image: Picture, text: dict[str, str] | None = None) -> None:
    """Writes a PNG file, whole or not at all, with `text` in its text chunks.

    Args:
      path: local or on a cloud's storage, such as `gs://...`; its folder is made if there is none.
      image: what to save.
      text: key to value, such as the prompt and the seed.
    """
    write_whole(epath.Path(path), png_bytes(image, text))


def png_bytes(image: Picture, text: dict[str, str] | None = None) -> bytes:
    """A PNG file with `text` in its text chunks.

    A value becomes a tEXt chunk if Latin-1 can write it, and an iTXt chunk, in UTF-8, otherwise
    (PNG specification, sections 11.3.3.2 and 11.3.3.4). Keys are 1 to 79 characters of Latin-1.
    """
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="PNG", pnginfo=chunks)
    return data.getvalue()


def film_bytes(
    frames: Images,
    kind: Literal["gif", "webp"] = "gif",
    *,
    seconds: float = 0.1,
    there_and_back: bool = True,
    scale: int = 1,
) -> bytes:
    """An animated GIF or WebP file that starts over for ever; for `write_whole`.

    Args:
      frames: at least one. A GIF has 256 colours for each.
      kind: of file.
      seconds: that each frame is shown: hundredths in a GIF, thousandths in a WebP.
      there_and_back: whether the frames between the ends come again in reverse, so that nothing
        jumps where it starts over.
      scale: each pixel becomes a square of this side.

    Raises:
      UserError: no frame, or less than a hundredth of a second.
    """
    if len(frames) == 0 or not seconds >= 0.01:
        raise UserError(
            f"A film of {len(frames)} frames of {seconds} seconds cannot be shown: give at least "
            "one frame, and 0.01 seconds or more."
        )
    if there_and_back:
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
        lossless=True,  # of WebP
    )
    return data.getvalue()


def read_text(path: epath.PathLike) -> dict[str, str]:
    """The text chunks of a PNG file: what `save_png` was given.

    Raises:
      UserError: there is no such file, or it is no PNG file.
    """
    try:
        data = epath.Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a PNG file.") from None
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()  # chunks may follow the pixels
            assert isinstance(image, PngImagePlugin.PngImageFile)
            return {key: str(value) for key, value in image.text.items()}
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path} is no readable PNG file ({error}); give one.") from error


def read_picture(path: epath.PathLike, data: bytes | None = None) -> Picture:
    """The pixels of an image file, upright, with white where it is transparent.

    Args:
      path: of the file; a mask is one that is white where an image is to be drawn anew.
      data: what is in it, where that was read before.

    Raises:
      UserError: there is no such file, or it is no image.
    """
    try:
        data = epath.Path(path).read_bytes() if data is None else data
    except (OSError, ValueError) as error:  # the latter for a path that there cannot be
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): give the path of an image.") from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            return np.asarray(upright.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads to
        raise UserError(f"{path} is no readable image ({error}): give one.") from error
