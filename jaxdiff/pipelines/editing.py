"""Images that a sampler starts from, and what lies between two prompts or two noises.

A mask is 1 where an image is drawn anew and 0 where it is kept, and may lie between.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PyTree, UInt8
from PIL import Image

from jaxdiff.errors import UserError
from jaxdiff.models.layers import TextFeatures


def check_images(image: np.ndarray, n: int) -> UInt8[np.ndarray, "n h w 3"]:
    """One image for each of n prompts, of which one may stand for all.

    Raises:
      UserError: not uint8 [h, w, 3], [1, h, w, 3] or [n, h, w, 3].
    """
    images = np.asarray(image)
    images = images[None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"image is {images.dtype} {images.shape}: expected uint8 [n, height, width, 3]."
        )
    return _one_each("image", images, n)


def check_masks(mask: np.ndarray, shape: tuple[int, ...]) -> Float32[np.ndarray, "n h w"]:
    """One mask, from 0 to 1, for each of the images [n, h, w, 3].

    Raises:
      UserError: another size, or values out of range.
    """
    masks = np.asarray(mask, np.float32)
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim != 3 or masks.shape[1:] != shape[1:3]:
        raise UserError(f"mask is of shape {masks.shape}: expected that of the image, {shape[:3]}.")
    if not (masks.min() >= 0 and masks.max() <= 1):
        raise UserError(
            f"mask goes from {masks.min():g} to {masks.max():g}: expected 0 where the image is "
            "kept and 1 where it is drawn anew."
        )
    return _one_each("mask", masks, shape[0])


def _one_each(name: str, values: np.ndarray, n: int) -> np.ndarray:
    if len(values) not in (1, n):
        raise UserError(f"{name} has {len(values)} for {n} prompts: give one, or one each.")
    return np.broadcast_to(values, (n, *values.shape[1:]))


def first_step(strength: float, num_steps: int) -> int:
    """The first step that is taken, the later the less an image is to change; at least one is.

    Raises:
      UserError: a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise UserError(
            f"strength is {strength}: expected from 0, which changes hardly anything, to 1, which "
            "keeps nothing but what the mask does."
        )
    # A product such as 0.3 * 10 may fall short of the whole number that is meant.
    return num_steps - max(1, min(num_steps, int(strength * num_steps + 1e-6)))


def coarse(mask: Float[Array, "n h w"], downsampling: int) -> Float[Array, "n i j 1"]:
    """A mask over latents: what has anything to be drawn anew in it is drawn anew as a whole."""
    n, height, _ = mask.shape
    cells = mask.reshape(n, height // downsampling, downsampling, -1, downsampling)
    return jnp.max(cells, axis=(2, 4))[..., None]


def mixed(one: PyTree, other: PyTree, share: Float[Array, " n"]) -> PyTree:
    """What two prompts are told as, and between: (1 - share) of one and share of the other.

    What stands behind the end of the shorter one takes no part: a network that is told where
    prompts end has never seen it, and draws nothing but noise of it.
    """
    if isinstance(one, TextFeatures) and isinstance(other, TextFeatures):
        one, other = _to_the_end(one), _to_the_end(other)

    def mix(a: Array, b: Array) -> Array:
        s = share.reshape(-1, *[1] * (a.ndim - 1))
        if a.dtype == bool:  # tokens that count in one of those that do
            return (a & (s < 1)) | (b & (s > 0))
        return ((1 - s) * a + s * b).astype(a.dtype)

    return jax.tree.map(mix, one, other)


def _to_the_end(text: TextFeatures) -> TextFeatures:
    return text._replace(tokens=text.tokens * text.mask[..., None].astype(text.tokens.dtype))


def slerp(
    one: Float32[np.ndarray, "*s"], other: Float32[np.ndarray, "*s"], share: float
) -> Float32[np.ndarray, "*s"]:
    """Noise between two noises, along the arc (Shoemake 1985): as large as they, unlike a mean."""
    cosine = np.sum(one * other) / (np.linalg.norm(one) * np.linalg.norm(other))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-4:  # one and the same
        return one
    shares = np.sin([(1 - share) * angle, share * angle]) / np.sin(angle)
    return (shares[0] * one + shares[1] * other).astype(np.float32)


def enlarged(images: UInt8[np.ndarray, "n h w 3"], factor: int) -> UInt8[np.ndarray, "n H W 3"]:
    """Images with sides `factor` times as long, by Lanczos' filter."""
    height, width = images.shape[1:3]
    size = width * factor, height * factor
    resized = [Image.fromarray(image).resize(size, Image.Resampling.LANCZOS) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def extended(
    image: UInt8[np.ndarray, "h w 3"],
    *,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
) -> tuple[UInt8[np.ndarray, "H W 3"], Float32[np.ndarray, "H W"]]:
    """An image on a larger canvas, and the mask of what is yet to be drawn there (outpainting).

    The canvas continues the image's edges, so that what is drawn has its colours to start from.
    Negative numbers cut off: `left=-16, right=16` pans to the right.

    Raises:
      UserError: nothing of the image is left.
    """
    height, width = image.shape[:2]
    cut = image[max(-top, 0) : height + min(bottom, 0), max(-left, 0) : width + min(right, 0)]
    if cut.size == 0:
        raise UserError(
            f"left={left}, top={top}, right={right}, bottom={bottom} leave nothing of an image of "
            f"{width}x{height}."
        )
    more = ((max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0)))
    mask = np.pad(np.zeros(cut.shape[:2], np.float32), more, constant_values=1)
    return np.pad(cut, (*more, (0, 0)), mode="edge"), mask
