"""Score images of scenes by the prompted attributes that a rule-based detector finds in them.

For reference, the ceiling is the score of rendered scenes, and `chance` that of images against
other prompts.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from jaxdiff.datasets.produce.attribute_detector import ATTRIBUTES, detect, match_attributes
from jaxdiff.datasets.produce.rendering import render
from jaxdiff.datasets.produce.scene import Scene, Split, sample_pair, sample_single

SEED = 20_240_611  # differs from all training seeds
SIZE = 64  # pixels: the only image size that `detect` supports


def evaluation_scenes(
    n: int, split: Split, kind: Literal["single", "two"] = "single"
) -> list[Scene]:
    """Return the first `n` of a fixed sequence of scenes; pairs hold out the first item."""
    sample = sample_single if kind == "single" else sample_pair
    seeds = (SEED, split == "held_out", kind == "two")
    return [sample(np.random.default_rng((*seeds, i)), split) for i in range(n)]


def score_scenes(
    images: Sequence[np.ndarray] | UInt8[np.ndarray, "n h w 3"], scenes: Sequence[Scene]
) -> dict[str, float]:
    """Return the fraction of uint8 images with each attribute of their scene, and all ("joint").

    An attribute is averaged over the scenes that have it.
    """
    found = [
        match_attributes(scene, detect(image)) for image, scene in zip(images, scenes, strict=True)
    ]
    return {
        name: float(np.mean([one[name] for one in found if name in one]))
        for name in (*ATTRIBUTES, "joint")
        if any(name in one for one in found)
    }


def render_scenes(scenes: Sequence[Scene]) -> UInt8[np.ndarray, "n h w 3"]:
    """Render each scene; the score of these images is the ceiling."""
    rngs = (np.random.default_rng((SEED, index)) for index in range(len(scenes)))
    return np.stack([render(scene, rng, SIZE) for scene, rng in zip(scenes, rngs, strict=True)])


def chance(
    images: Sequence[np.ndarray] | UInt8[np.ndarray, "n h w 3"], scenes: Sequence[Scene]
) -> dict[str, float]:
    """Score images against other scenes: the scenes rolled by half their number."""
    order = np.roll(np.arange(len(scenes)), max(1, len(scenes) // 2)).tolist()
    return score_scenes(images, [scenes[i] for i in order])
