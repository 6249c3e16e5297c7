"""Draws docs/edits.png and docs/edits_more.png with the weights that ship with jaxdiff.

    python docs/edits.py

Every picture is what comes of the seeds that stand here; each row is said in the README.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

import jaxdiff
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.io.images import save_png
from jaxdiff.pipelines.editing import extended
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.sampling.solvers_ode import DDIM

WIDE = 8  # pictures in a row
STRENGTHS = (0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)
BESIDE = (
    "a green pepper",
    "a yellow lemon",
    "a purple aubergine",
    "a red strawberry",
    "an orange carrot",
    "a green pea",
    "a yellow pear",
)
WIDE_PROMPTS = ["a yellow lemon", "a red pepper", "a blue banana"]
RECORDS = (4, 14, 11, 23)  # of the drawings of the training split


def row(images: Iterable[np.ndarray], scale: int) -> np.ndarray:
    """Pictures [h, w, 3] side by side, each pixel a square of `scale`."""
    return np.concatenate(list(images), axis=1).repeat(scale, 0).repeat(scale, 1)


def edits(pipeline: Pipeline) -> np.ndarray:
    """An image becomes another; half of one is drawn anew; two prompts, without and with seeds.

    Last an image, panned to the right and down, zoomed out of, and three at 16:9.
    """
    tomato = pipeline(["a large ripe tomato with a stem"], seeds=3)
    lemons = pipeline(
        ["a large yellow lemon"] * len(STRENGTHS),
        seeds=3,
        image=tomato,
        strength=STRENGTHS,
        num_steps=40,
    )
    banana = pipeline(["a small red banana on the left"], seeds=1)
    right = np.zeros(banana.shape[1:3], np.float32)
    right[:, right.shape[1] // 2 :] = 1
    pairs = pipeline(
        [f"a red banana left of {thing}" for thing in BESIDE],
        seeds=range(len(BESIDE)),
        image=banana,
        mask=right,
        repeats=4,
    )
    rows = [
        np.concatenate([tomato, lemons]),
        np.concatenate([banana, pairs]),
        pipeline.between(("a yellow banana", "a red tomato"), WIDE, seeds=(3, 3)),
        pipeline.between(("a small green pea", "a large purple aubergine"), WIDE, seeds=(3, 9)),
    ]
    small = np.asarray(Image.fromarray(tomato[0]).resize((48, 48), Image.Resampling.LANCZOS))
    canvases = [
        extended(tomato[0], left=-24, right=24),
        extended(tomato[0], top=-16, bottom=16),
        extended(small, left=8, right=8, top=8, bottom=8),
    ]
    moved = pipeline(
        ["a ripe tomato with a stem"] * len(canvases),
        seeds=3,
        image=np.stack([canvas for canvas, _ in canvases]),
        mask=np.stack([mask for _, mask in canvases]),
        repeats=4,
    )
    wide = pipeline(WIDE_PROMPTS, seeds=range(1, 4), size=pipeline.size_of("16:9"))
    height = tomato.shape[1]
    margin = np.full((len(wide), height - wide.shape[1], *wide.shape[2:]), 255, np.uint8)
    last = [*tomato, *moved, *np.concatenate([margin, wide], axis=1)]
    rest = WIDE * height - sum(image.shape[1] for image in last)
    last.append(np.full((height, rest, 3), 255, np.uint8))
    return np.concatenate([*(row(images, 2) for images in rows), row(last, 2)])


def more(pipeline: Pipeline) -> np.ndarray:
    """Drawings and what their noise draws; variations; a blend; tiles; enlargements."""
    drawn = [Produce(split="train")[i] for i in RECORDS]
    images = np.stack([record["image"] for record in drawn])
    prompts = [record["captions"][0] for record in drawn]
    print(*prompts, sep="\n")
    noise = pipeline.invert(images, prompts, num_steps=20)
    back = pipeline(prompts, latents=noise, solver=DDIM(), guidance_scale=1, num_steps=20)
    coded = pipeline.autoencode(images).astype(float)
    error = np.mean((back - coded) ** 2, axis=(1, 2, 3))
    print(
        "inverted and drawn again, dB to what the autoencoder makes of them:",
        np.round(10 * np.log10(255**2 / error), 1),
    )
    varied = pipeline.variations(images[2], 0.5, prompt=prompts[2], seeds=range(7), num_steps=20)
    blend = pipeline.between((prompts[2], prompts[3]), WIDE, images=images[2:], num_steps=20)
    things = ["a green pea", "a large blue banana", "a large ripe tomato"]
    tiles = pipeline.seamless()(things, seeds=(5, 1, 0), num_steps=30)
    names = ["a blue banana left of a red tomato", "a large green pear"]
    small = pipeline(names, seeds=(5, 4))
    large = pipeline.upscaled(small, names, strength=0.1, guidance_scale=1)
    enlarged = small.repeat(2, 1).repeat(2, 2)
    pairs = np.stack([images, back], 1).reshape(-1, *images.shape[1:])
    return np.concatenate(
        [
            row(pairs, 2),
            row(np.concatenate([images[2:3], varied]), 2),
            row(blend, 2),
            row(np.tile(tiles, (1, 3, 3, 1)), 2)[:, : 2 * WIDE * tiles.shape[2]],
            row(np.stack([enlarged, large], 1).reshape(-1, *large.shape[1:]), 2),
        ]
    )


def main():
    """Draws both."""
    pipeline, here = jaxdiff.load(), Path(__file__).parent
    save_png(here / "edits.png", edits(pipeline))
    save_png(here / "edits_more.png", more(pipeline))


if __name__ == "__main__":
    main()
