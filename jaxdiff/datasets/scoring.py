"""Disturbed images for the ceilings of scorers, and other prompts for chance."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

T = TypeVar("T")

# Standard deviation of the ceiling's noise, in grey levels of 256. With the shift by one pixel, it
# disturbs an emoji about as much as sampling does.
_NOISE = 24.0


def disturbed(
    image: UInt8[np.ndarray, "s s 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "s s 3"]:
    """Return an image shifted by a pixel, with noise."""
    moved = np.roll(image, 1, axis=rng.integers(2))
    noisy = moved + rng.normal(0.0, _NOISE, image.shape)
    return np.clip(noisy.round(), 0, 255).astype(np.uint8)


def rolled(wanted: Sequence[T]) -> list[T]:
    """Roll targets by half of the distinct ones, so that repeated prompts never match."""
    distinct = list(dict.fromkeys(wanted))
    half = max(1, len(distinct) // 2)
    other = dict(zip(distinct, [*distinct[-half:], *distinct[:-half]], strict=True))
    return [other[one] for one in wanted]
