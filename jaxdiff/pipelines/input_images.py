"""Check the images that a call starts from or refers to, and convert them to arrays."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from jaxdiff.config.checked import checked
from jaxdiff.errors import UserError
from jaxdiff.io.image_decoding import ImageError
from jaxdiff.io.images import mask_of, picture_of
from jaxdiff.models.text_to_image import TextToImage

Number = int | np.integer | float | np.floating
AnyImages = np.ndarray | Image.Image | Sequence[Image.Image]

REFERENCE_PIXELS = 1024 * 1024
"""Pixels of a reference image; larger ones are resized."""

REFERENCE_SIDE, REFERENCE_RATIO = 64, 8
"""Least side of a reference image, and the largest ratio of its sides."""


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class InitImage:
    """Images to start from.

    Attributes:
      image: uint8 or float in [0, 1], [n, h, w, 3] or one for all, or Pillow's; its size is the
        result's.
      mask: 1 where the image is replaced and 0 where pixels are kept, [n, h, w] or one for all, or
        Pillow's; None replaces all.
      strength: amount of noise added to the image, from 0 to 1, one for all or one each; 0.6 by
        default, 1 with a mask.
    """

    image: AnyImages
    mask: AnyImages | None = None
    strength: Number | Iterable[Number] | None = None


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """Reference images, whose contents prompts describe how to edit and combine.

    Images above a megapixel are resized to one, and sides are cropped to multiples of the model's
    `size_multiple`, about the centre, as diffusers' Flux2KleinPipeline does. The size of the result
    is that of the first, unless the call states another.

    Attributes:
      images: one to `Denoiser.max_references` of them, each as `InitImage.image`, of its own size.
    """

    images: Sequence[AnyImages] | AnyImages


def check_references(
    references: References, n: int, spec: TextToImage
) -> tuple[UInt8[np.ndarray, "n _ _ 3"], ...]:
    """Return the reference images as the model encodes them, each of them for n prompts.

    Raises:
      UserError: the model reads none, or fewer; or an image is none, or too small or narrow.
    """
    images = references.images
    if isinstance(images, Image.Image) or getattr(images, "ndim", 0) == 3:
        images = [images]
    check_reference_count(len(images), spec)
    checked = [check_images(image, name="A reference image") for image in images]
    return tuple(
        check_images(fit_reference(image, spec.size_multiple), n, "A reference image")
        for image in checked
    )


def check_reference_count(count: int, spec: TextToImage) -> None:
    """Raise `UserError` for more reference images than a model reads, or for none."""
    most = spec.denoiser.max_references
    if most == 0:
        raise UserError(
            f"{spec.name} reads no reference images: expected none; use a model that does, such as "
            "FLUX.2-klein, or start from an image."
        )
    if not 1 <= count <= most:
        raise UserError(
            f"There are {count} reference images: expected 1 to {most} for {spec.name}."
        )


class ReferenceSize(NamedTuple):
    """Width and height to which a reference image is resized, and then cropped."""

    resized: tuple[int, int]
    cropped: tuple[int, int]


def reference_size(size: tuple[int, int], multiple: int) -> ReferenceSize:
    """Return what becomes of a reference image of this width and height.

    Raises:
      UserError: it is too small or too narrow.
    """
    width, height = size
    sides = sorted((height, width))
    if sides[0] < max(REFERENCE_SIDE, multiple) or sides[1] > REFERENCE_RATIO * sides[0]:
        raise UserError(
            f"A reference image is {width}x{height}: expected sides of at least {REFERENCE_SIDE} "
            f"pixels, the longer at most {REFERENCE_RATIO} times the shorter; crop or enlarge it."
        )
    if height * width > REFERENCE_PIXELS:
        scale = math.sqrt(REFERENCE_PIXELS / (width * height))
        width, height = int(width * scale), int(height * scale)
    cropped = width // multiple * multiple, height // multiple * multiple
    return ReferenceSize((width, height), cropped)


def fit_reference(
    images: UInt8[np.ndarray, "n h w 3"], multiple: int
) -> UInt8[np.ndarray, "n H W 3"]:
    """Resize images to at most `REFERENCE_PIXELS`, and crop their sides to multiples.

    Raises:
      UserError: they are too small or too narrow.
    """
    size = images.shape[2], images.shape[1]
    (width, height), (columns, rows) = reference_size(size, multiple)
    if (width, height) != size:
        resized = (
            Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
            for image in images
        )
        images = np.stack([np.asarray(image) for image in resized])
    top, left = (height - rows) // 2, (width - columns) // 2
    return images[:, top : top + rows, left : left + columns]


def check_images(
    image: Any, n: int | None = None, name: str = "image"
) -> UInt8[np.ndarray, "n h w 3"]:
    """Return one image for each of n prompts, by default as many as there are.

    A single image is repeated. Pillow's are read as `io/images.py` reads files. Messages call it
    `name`.

    Raises:
      UserError: neither uint8 nor float in [0, 1], or not [h, w, 3], [1, h, w, 3] or [n, h, w, 3].
    """
    images = _array(name, image, picture_of)
    images = images[None] if images.ndim == 3 else images
    if images.ndim == 4 and images.dtype.kind == "f":
        if not (images.min(initial=0) >= 0 and images.max(initial=1) <= 1):
            raise UserError(
                f"{name} has values from {images.min():g} to {images.max():g}: expected uint8, or "
                "floats from 0 to 1."
            )
        images = np.rint(images * 255).astype(np.uint8)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise UserError(
            f"{name} is {images.dtype} {images.shape}: expected uint8 [n, height, width, 3]."
        )
    return _broadcast(name, images, len(images) if n is None else n)


def check_masks(mask: Any, shape: tuple[int, ...]) -> Float32[np.ndarray, "n h w"]:
    """Return one mask, from 0 to 1, for each of the images [n, h, w, 3].

    Pillow's images are masks as `io/images.py` reads files.

    Raises:
      UserError: another size, or values out of range.
    """
    masks = _array("mask", mask, mask_of)
    if masks.dtype.kind not in "biuf":
        raise UserError(f"mask is {masks.dtype}: expected numbers from 0 to 1.")
    masks = masks.astype(np.float32)
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim != 3 or masks.shape[1:] != shape[1:3]:
        raise UserError(f"mask is of shape {masks.shape}: expected that of the image, {shape[:3]}.")
    if not (masks.min(initial=0) >= 0 and masks.max(initial=0) <= 1):
        raise UserError(
            f"mask goes from {masks.min():g} to {masks.max():g}: expected 0 where the image is "
            "kept and 1 where it is replaced."
        )
    return _broadcast("mask", masks, shape[0])


def _array(name: str, value: Any, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """Return an array; `convert` reads Pillow's images.

    Raises:
      UserError: it is neither an array nor an image that can be read.
    """
    try:
        if isinstance(value, list | tuple):
            value = [convert(x) if isinstance(x, Image.Image) else x for x in value]
        array = np.asarray(convert(value) if isinstance(value, Image.Image) else value)
    except ImageError as error:
        raise UserError(
            f"{name} cannot be read ({error}): expected an image of 8 bits per channel."
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} is no array ({error}): expected images of one size.") from error
    if array.dtype.kind in "USO":
        raise UserError(
            f"{name} is a {type(value).__name__}: expected an array, or an image of Pillow such as "
            "PIL.Image.open(file)."
        )
    return array


def _broadcast(name: str, values: np.ndarray, n: int) -> np.ndarray:
    if len(values) not in (1, n):
        raise UserError(f"{name} has {len(values)} for {n} prompts: expected one, or one each.")
    return np.broadcast_to(values, (n, *values.shape[1:]))
