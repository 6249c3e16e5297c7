"""Parts of scenes that several data sets share."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

DIRECTIONS: dict[str, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "centre": (0, 0),
}
"""Of the first object from the second, or of the object from the centre; y points down."""


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Sample one of the options, all with the same probability."""
    return options[int(rng.integers(len(options)))]
