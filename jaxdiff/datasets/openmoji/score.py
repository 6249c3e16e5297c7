"""Score whether images of people at work show the prompted combination of attributes.

An image is compared with the 18 emoji of the prompted profession: three genders, times five skin
tones and none. It is correct if the nearest is the prompted one. The distance is the mean squared
difference of slightly blurred pixels. It was fixed before any model was trained; the ceiling states
how well it recognises disturbed emoji.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from jaxdiff.datasets.openmoji.names import Worker
from jaxdiff.datasets.openmoji.source import OpenMoji
from jaxdiff.datasets.scoring import disturbed, rolled

_SEED = 0


class WorkerPrompt(NamedTuple):
    """A prompt, and the name of the emoji that it describes."""

    text: str
    target: str


class OpenMojiScore(NamedTuple):
    """Fractions of images, in [0, 1], each as {"gender", "tone", "joint"}.

    "joint": the nearest emoji is the prompted one. "gender" and "tone": it has the prompted gender
    or tone.

    `score`: of the images. `ceiling`: of the emoji, shifted by a pixel and with noise. `chance`: of
    the images against prompts rolled by half the number of distinct emoji, so that with two or more
    none is compared with its own.
    """

    score: dict[str, float]
    ceiling: dict[str, float]
    chance: dict[str, float]


def held_out_prompts(count: int) -> list[WorkerPrompt]:
    """Return `count` prompts that cycle through the held-out emoji, with varying captions."""
    emojis = OpenMoji(split="held_out").emojis
    prompts = []
    for i in range(count):
        cycle, place = divmod(i, len(emojis))
        texts = emojis[place].captions
        prompts.append(WorkerPrompt(texts[cycle % len(texts)], emojis[place].name))
    return prompts


def score_workers(
    images: UInt8[np.ndarray, "n s s 3"], targets: Sequence[str], source: OpenMoji
) -> OpenMojiScore:
    """Score one image for each emoji name in `targets`, as given by `held_out_prompts`.

    `source` is the split "all" at the size of the images. Emoji with equal pixels (man and person
    in many professions) count as the same.

    Raises:
      ValueError: sizes or numbers differ.
      KeyError: a target is not a person at work.
    """
    if len(images) != len(targets) or len(targets) == 0:
        raise ValueError(f"{len(images)} images for {len(targets)} targets: give one for each")
    if images.shape[1] != source.size:
        raise ValueError(f"images of {images.shape[1]} pixels, emoji of {source.size}")
    workers = {emoji.worker: i for i, emoji in enumerate(source.emojis) if emoji.worker}
    worker_of = {source.emojis[i].name: worker for worker, i in workers.items()}
    real = {worker: _blurred(source.image(i)) for worker, i in workers.items()}
    wanted = [worker_of[name] for name in targets]
    rng = np.random.default_rng(_SEED)
    blurred = [_blurred(image) for image in images]
    ceiling = [_blurred(disturbed(source.image(workers[worker]), rng)) for worker in wanted]
    return OpenMojiScore(
        score=_fractions(blurred, wanted, real),
        ceiling=_fractions(ceiling, wanted, real),
        chance=_fractions(blurred, rolled(wanted), real),
    )


def _fractions(
    images: list[np.ndarray], wanted: list[Worker], real: dict[Worker, np.ndarray]
) -> dict[str, float]:
    """Return the fractions of images whose nearest emoji has the wanted gender, tone, and both."""
    correct = []
    for image, target in zip(images, wanted, strict=True):
        distances = {
            worker: float(np.mean((image - emoji) ** 2))
            for worker, emoji in real.items()
            if worker.profession == target.profession
        }
        least = min(distances.values())
        # Emoji with equal pixels are all nearest.
        nearest = [worker for worker, distance in distances.items() if distance == least]
        correct.append(
            (
                any(worker.gender == target.gender for worker in nearest),
                any(worker.tone == target.tone for worker in nearest),
                target in nearest,
            )
        )
    return dict(zip(("gender", "tone", "joint"), np.mean(correct, axis=0).tolist(), strict=True))


def _blurred(image: UInt8[np.ndarray, "s s 3"]) -> Float[np.ndarray, "s s 3"]:
    """Blur by 1/64 of the side, which tolerates small shifts of thin lines."""
    blur = ImageFilter.GaussianBlur(image.shape[0] / 64)
    return np.asarray(Image.fromarray(image).filter(blur), np.float32)
