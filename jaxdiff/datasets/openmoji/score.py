"""Does a picture of a person at work show the combination that was prompted?

A picture is compared with all real drawings that share the prompted profession, 18 of them:
three genders times five skin tones and none. It is right if the nearest is the prompted one.
The distance is the mean squared difference of the pixels after a slight blur, fixed before any
model was trained; the ceiling says how well it knows the real drawings again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from jaxdiff.datasets.openmoji.names import Worker
from jaxdiff.datasets.openmoji.source import OpenMoji

# Of the ceiling's disturbance: the standard deviation of the noise, in grey levels of 256. The
# drawing is moved by one pixel besides, about what separates a sampled picture from a real one.
_NOISE = 24.0
_SEED = 0


class Prompt(NamedTuple):
    """A text for the model, and the name of the drawing that it describes."""

    text: str
    target: str


class OpenMojiScore(NamedTuple):
    """Fractions of pictures, in [0, 1], each as {"gender", "tone", "joint"}.

    "joint": the nearest drawing is the prompted one. "gender" and "tone": the nearest has the
    prompted one.

    `score`: of the pictures. `ceiling`: of the real drawings, moved by a pixel and made noisy.
    `chance`: of the pictures against the prompts shifted by half of the drawings that they name,
    so that none meets its own drawing where there are two or more.
    """

    score: dict[str, float]
    ceiling: dict[str, float]
    chance: dict[str, float]


def held_out_prompts(count: int) -> list[Prompt]:
    """`count` prompts that go round the held-out combinations and, slower, their captions."""
    drawings = OpenMoji(split="held_out").drawings
    rounds = (divmod(i, len(drawings)) for i in range(count))
    return [
        Prompt(drawings[i].captions[turn % len(drawings[i].captions)], drawings[i].name)
        for turn, i in rounds
    ]


def score(
    images: UInt8[np.ndarray, "n s s 3"], targets: Sequence[str], drawings: OpenMoji
) -> OpenMojiScore:
    """Scores one picture for each name in `targets`, as `held_out_prompts` gives them.

    `drawings` is the split "all" at the size of the images. Drawings that are equal pixel by
    pixel (a man and a person of many professions) count as the same.

    Raises `ValueError` where the sizes or the numbers differ, and `KeyError` for a target that
    names no person at work.
    """
    if len(images) != len(targets) or len(targets) == 0:
        raise ValueError(f"{len(images)} images for {len(targets)} targets: give one for each")
    if images.shape[1] != drawings.size:
        raise ValueError(f"images of {images.shape[1]} pixels, drawings of {drawings.size}")
    pixels = {
        drawing.worker: (drawing.name, drawings.image(index))
        for index, drawing in enumerate(drawings.drawings)
        if drawing.worker is not None
    }
    worker_of = {name: who for who, (name, _) in pixels.items()}
    real = {who: _blurred(image) for who, (_, image) in pixels.items()}
    wanted = [worker_of[name] for name in targets]
    rng = np.random.default_rng(_SEED)
    shown = [_blurred(image) for image in images]
    known = [_blurred(_disturbed(pixels[who][1], rng)) for who in wanted]
    return OpenMojiScore(
        score=_right(shown, wanted, real),
        ceiling=_right(known, wanted, real),
        chance=_right(shown, _shifted(wanted), real),
    )


def _shifted(wanted: list[Worker]) -> list[Worker]:
    """For each prompted drawing the one that lies half of them further.

    Of the drawings, not of the prompts: these go round, and may be at the same place again.
    """
    drawings = list(dict.fromkeys(wanted))
    half = max(1, len(drawings) // 2)
    other = dict(zip(drawings, [*drawings[-half:], *drawings[:-half]], strict=True))
    return [other[who] for who in wanted]


def _right(
    images: list[np.ndarray], wanted: list[Worker], real: dict[Worker, np.ndarray]
) -> dict[str, float]:
    """The share of images whose nearest drawing has the wanted gender or tone, or is wanted."""
    right = []
    for image, target in zip(images, wanted, strict=True):
        distances = {
            who: float(np.mean((image - drawing) ** 2))
            for who, drawing in real.items()
            if who.profession == target.profession
        }
        least = min(distances.values())
        # Equal drawings are at an equal distance: all of them are the nearest.
        nearest = [who for who, distance in distances.items() if distance == least]
        right.append(
            (
                any(who.gender == target.gender for who in nearest),
                any(who.tone == target.tone for who in nearest),
                target in nearest,
            )
        )
    return dict(zip(("gender", "tone", "joint"), np.mean(right, axis=0).tolist(), strict=True))


def _blurred(image: UInt8[np.ndarray, "s s 3"]) -> Float[np.ndarray, "s s 3"]:
    """The image after a Gaussian blur of one pixel in 64, so that thin lines need not coincide."""
    blur = ImageFilter.GaussianBlur(image.shape[0] / 64)
    return np.asarray(Image.fromarray(image).filter(blur), np.float32)


def _disturbed(
    image: UInt8[np.ndarray, "s s 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "s s 3"]:
    moved = np.roll(image, 1, axis=rng.integers(2))
    noisy = moved + rng.normal(0.0, _NOISE, image.shape)
    return np.clip(noisy.round(), 0, 255).astype(np.uint8)
