"""What a user asks a pipeline for, checked, as the rows of arrays that its program takes."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.pipelines.editing import check_images, check_masks, first_step
from jaxdiff.sampling.sampler import check_num_steps

LARGEST_SEED = 2**32 - 1
IMAGE_STRENGTH = 0.6

Integer = int | np.integer
Number = Integer | float | np.floating
Rows = dict[str, np.ndarray]  # of each image, along the first axis


def texts(name: str, values: Sequence[str]) -> list[str]:
    """A list of texts; one text alone would be taken letter by letter.

    Raises:
      UserError: it is one text.
    """
    if isinstance(values, str):
        raise UserError(f"{name} is one text: expected a list of them, [{values!r}].")
    return list(values)


def one_each(name: str, values: Any, n: int) -> list[Any]:
    """A list of n values, of which one, by itself or in a list, may stand for all.

    Raises:
      UserError: there are neither one nor n.
    """
    alone = not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0
    values = [values] if alone else list(values)
    if len(values) == 1:
        return values * n
    if len(values) != n:
        raise UserError(f"{name} has {len(values)} values for {n} prompts: give one, or one each.")
    return values


def seed_array(values: Sequence[Integer]) -> np.ndarray:
    """Seeds uint32 [n].

    Raises:
      UserError: one is out of range.
    """
    wrong = [seed for seed in values if not 0 <= seed <= LARGEST_SEED]
    if wrong:
        raise UserError(f"seed {wrong[0]} is out of range: expected 0 to {LARGEST_SEED}.")
    return np.asarray(values, np.uint32)


def steps_of_each(num_steps: Integer | Iterable[Integer], n: int) -> list[int]:
    """The number of steps of each of n images.

    Raises:
      UserError: neither one nor n, or a number that no solver can take.
    """
    steps = [int(count) for count in one_each("num_steps", num_steps, n)]
    for count in set(steps):
        check_num_steps(count)
    return steps


def images_and_size(
    image: np.ndarray | None, size: tuple[int, int] | None, own: int, n: int
) -> tuple[np.ndarray | None, tuple[int, int]]:
    """Images to start from, if there are any, and width and height of what is drawn.

    Raises:
      UserError: other images than `check_images` takes, or of another size than asked for.
    """
    if image is None:
        return None, size or (own, own)
    images = check_images(image, n)
    theirs = images.shape[2], images.shape[1]
    if size not in (None, theirs):
        raise UserError(
            f"size is {size[0]}x{size[1]} but image is {theirs[0]}x{theirs[1]}: leave out size, or "
            "resize the image."
        )
    return images, theirs


def image_rows(
    images: np.ndarray | None,
    mask: np.ndarray | None,
    strength: Number | Iterable[Number] | None,
    num_steps: Sequence[int],
) -> tuple[Rows, list[int]]:
    """The rows of images to start from, and the first step that each takes.

    Raises:
      UserError: a mask or a strength without an image, or that do not fit.
    """
    n = len(num_steps)
    if images is None:
        if mask is not None or strength is not None:
            raise UserError("mask and strength are about an image: give image as well.")
        return {}, [0] * n
    rows = {"image": images}
    if mask is not None:
        rows["mask"] = check_masks(mask, images.shape)
    default = IMAGE_STRENGTH if mask is None else 1.0
    strengths = one_each("strength", default if strength is None else strength, n)
    first = [first_step(float(s), k) for s, k in zip(strengths, num_steps, strict=True)]
    return rows, first


def noise_rows(latents: Any, n: int, shape: tuple[int, int, int]) -> Rows:
    """The row of given noise, if there is any.

    Raises:
      UserError: it is of another shape.
    """
    if latents is None:
        return {}
    noise = np.asarray(latents, np.float32)
    if noise.shape != (n, *shape):
        raise UserError(
            f"latents are of shape {noise.shape}: expected {(n, *shape)} for {n} prompts."
        )
    return {"noise": noise}
