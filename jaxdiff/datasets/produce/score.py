"""Scores pictures of drawn scenes by how many of the prompted attributes a reader finds in them.

A score says little alone: the ceiling is that of true drawings of the same scenes,
`chance` what the pictures score against the scenes shifted by half of their number.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from jaxdiff.datasets.produce.attribute_detector import ATTRIBUTES, check, read
from jaxdiff.datasets.produce.rendering import render
from jaxdiff.datasets.produce.scene import Scene, Split, draw_pair, draw_single

SEED = 20_240_611  # far from any training seed
SIZE = 64  # pixels: the side of the pictures that `read` knows, and of no others


def evaluation_scenes(
    n: int, split: Split, kind: Literal["single", "two"] = "single"
) -> list[Scene]:
    """The same `n` scenes at every call; of "two" held-out scenes, the first item is held out."""
    draw = draw_single if kind == "single" else draw_pair
    seeds = (SEED, split == "held_out", kind == "two")
    return [draw(np.random.default_rng((*seeds, i)), split) for i in range(n)]


def score(
    images: Sequence[np.ndarray] | UInt8[np.ndarray, "n h w 3"], scenes: Sequence[Scene]
) -> dict[str, float]:
    """The share of scenes whose attribute is read back from their image (uint8), and of "joint".

    An attribute that some scenes lack is averaged over those that have it.
    """
    found = [check(scene, read(image)) for image, scene in zip(images, scenes, strict=True)]
    return {
        name: float(np.mean([one[name] for one in found if name in one]))
        for name in (*ATTRIBUTES, "joint")
        if any(name in one for one in found)
    }


def true_drawings(scenes: Sequence[Scene]) -> UInt8[np.ndarray, "n h w 3"]:
    """A fresh drawing of each scene, whose score is the ceiling."""
    rngs = (np.random.default_rng((SEED, index)) for index in range(len(scenes)))
    return np.stack([render(scene, rng, SIZE) for scene, rng in zip(scenes, rngs, strict=True)])


def chance(
    images: Sequence[np.ndarray] | UInt8[np.ndarray, "n h w 3"], scenes: Sequence[Scene]
) -> dict[str, float]:
    """What the images score against the prompts shifted by half of their number.

    So none of two or more meets its own scene.
    """
    order = np.roll(np.arange(len(scenes)), max(1, len(scenes) // 2)).tolist()
    return score(images, [scenes[i] for i in order])
