"""Image files with text: PNG in text chunks, WebP and JPEG in EXIF, as web UIs write them.

EXIF's UserComment holds the text `parameters`, in UTF-16 after the prefix UNICODE (Exif 2.32,
section 4.6.5), and ImageDescription all other texts, as JSON. WebP is lossless.
"""

import io
import json
from typing import Any, Literal, cast

from etils import epath
from PIL import ExifTags, Image

from jaxdiff.errors import UserError
from jaxdiff.io import images as pictures
from jaxdiff.io.image_decoding import ImageError, open_image, upright, without_warnings
from jaxdiff.io.text import check_text, parse_json

Format = Literal["png", "webp", "jpg"]

PARAMETERS = "parameters"
JPEG_QUALITY = 95
LARGEST_EXIF = 65_000  # bytes; about the most that a JPEG segment holds

_UNICODE = b"UNICODE\0"
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")


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
    """Return the texts of a lossless file, PNG or WebP; {} if there are none.

    Raises:
      UserError: there is no such file, it is damaged, of another kind, or has a text that is
        ambiguous or no text.
    """
    data = pictures.read_image_file(path)
    try:
        with open_image(data) as image:
            if image.format == "PNG":
                upright(image)  # chunks may follow the pixels
                found = {key: str(value) for key, value in cast(Any, image).text.items()}
            elif image.format == "WEBP":
                found = _texts_of_exif(image)
            else:
                raise UserError(
                    f"{path} is a {image.format} file, whose compression changes pixels or which "
                    "has no texts: expected PNG or WebP, which are lossless."
                )
    except ImageError as error:
        raise UserError(
            f"{path} is not a readable PNG or WebP file ({error}): give the path of one."
        ) from error
    for key, value in found.items():
        check_text(value, f"The text {key!r} of {path}")
        chunks = (kind + key.encode("latin-1", "replace") + b"\0" for kind in _TEXT_CHUNKS)
        if sum(data.count(chunk) for chunk in chunks) > 1:
            raise UserError(f"{path} has several texts {key!r}: take the original file.")
    return found


def _texts_of_exif(image: Image.Image) -> dict[str, str]:
    """Return what `_exif` wrote; {} for EXIF of other programs, or damaged."""
    try:
        with without_warnings():
            exif = image.getexif()
            comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        others = parse_json(exif[ExifTags.Base.ImageDescription], "ImageDescription")
        parameters = comment.removeprefix(_UNICODE).decode("utf-16-be")
        return {str(k): str(v) for k, v in others.items()} | {PARAMETERS: parameters}
    except Exception:  # of many types, as values may be of any type
        return {}
