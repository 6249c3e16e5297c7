"""Image files with text: PNG in text chunks, WebP and JPEG in EXIF, as web UIs write them.

EXIF's UserComment holds the text `parameters`, in UTF-16 after the prefix UNICODE (Exif 2.32,
section 4.6.5), and ImageDescription all other texts, as JSON. WebP is lossless.
"""

import io
import json
from typing import Literal

from etils import epath
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from jaxdiff.errors import UserError
from jaxdiff.io import images as pictures
from jaxdiff.io.files import read_bytes
from jaxdiff.io.text import parse_json

Format = Literal["png", "webp", "jpg"]

PARAMETERS = "parameters"
JPEG_QUALITY = 95
LARGEST_EXIF = 65_000  # bytes; about the most that a JPEG segment holds

_UNICODE = b"UNICODE\0"


def image_bytes(image: pictures.Picture, text: dict[str, str], kind: Format) -> bytes:
    """Encode an image file with texts by name; web UIs read `parameters`.

    Raises:
      UserError: the texts are too long for EXIF.
    """
    if kind == "png":
        return pictures.png_bytes(image, text)
    exif = _exif(text)
    if len(exif.tobytes()) > LARGEST_EXIF:
        raise UserError(
            f"The prompt and the settings are too long for a {kind} file: shorten them, or choose "
            "--format png."
        )
    options = {"lossless": True} if kind == "webp" else {"quality": JPEG_QUALITY, "subsampling": 0}
    data = io.BytesIO()
    picture = Image.fromarray(image)
    picture.save(data, format="WEBP" if kind == "webp" else "JPEG", exif=exif, **options)
    return data.getvalue()


def _exif(text: dict[str, str]) -> Image.Exif:
    exif = Image.Exif()
    others = {name: value for name, value in text.items() if name != PARAMETERS}
    exif[ExifTags.Base.ImageDescription] = json.dumps(others)
    comment = _UNICODE + text.get(PARAMETERS, "").encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif


def read_image_text(path: epath.PathLike) -> dict[str, str]:
    """Return the texts of a lossless file, PNG or WebP.

    Raises:
      UserError: there is no such file, it is of another kind, or is a JPEG.
    """
    data = read_bytes(path, "the path of an image")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "WEBP", "JPEG"]) as image:
            if isinstance(image, PngImagePlugin.PngImageFile):
                image.load()  # chunks may follow the pixels
                return {key: str(value) for key, value in image.text.items()}
            kind, exif = image.format, image.getexif()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(
            f"{path} is not a readable PNG or WebP file ({error}): give the path of one."
        ) from error
    if kind != "WEBP":
        raise UserError(
            f"{path} is a JPEG file, whose compression changes pixels: expected PNG or WebP, which "
            "are lossless."
        )
    try:
        others = parse_json(exif[ExifTags.Base.ImageDescription], path)
        comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        parameters = comment.removeprefix(_UNICODE).decode("utf-16-be")
        return {str(k): str(v) for k, v in others.items()} | {PARAMETERS: parameters}
    except (KeyError, ValueError, AttributeError, UserError):
        return {}
