"""Generate the pictures of docs/editing.md, in docs/images, with the shipped weights.

python docs/edits.py
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

import jaxdiff
from jaxdiff import DDIM, InitImage, Pipeline, Sampler
from jaxdiff.io.images import save_png
from jaxdiff.pipelines import edit

COLUMNS = 8
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
BESIDE = (
    "a green pepper",
    "a yellow lemon",
    "a purple aubergine",
    "a red strawberry",
    "an orange carrot",
    "a green pea",
    "a yellow pear",
)
PROMPTS = (
    "a flat drawing of a penguin",
    "a shaded drawing of a strawberry",
    "a cartoon drawing of a pizza",
    "a shaded drawing of a fox",
)
RESAMPLE = Sampler(resample_steps=4)


def row(images: Iterable[np.ndarray], scale: int = 1) -> np.ndarray:
    """Place images [h, w, 3] side by side, each pixel as a square of `scale`."""
    return np.concatenate(list(images), axis=1).repeat(scale, 0).repeat(scale, 1)


def image_to_image(pipe: Pipeline, tomato: np.ndarray) -> np.ndarray:
    """A tomato, and lemons that start from it at growing strength."""
    init = InitImage(image=tomato, strength=STRENGTHS)
    prompts = ["a large lemon"] * len(STRENGTHS)
    return row([tomato, *pipe(prompts, seeds=3, init=init, num_steps=40)])


def inpainting(pipe: Pipeline) -> np.ndarray:
    """A banana, and what is inpainted in the right half beside it."""
    (banana,) = pipe("a small red banana on the left", seeds=1)
    mask = np.zeros(banana.shape[:2], np.float32)
    mask[:, mask.shape[1] // 2 :] = 1
    prompts = [f"a red banana left of {thing}" for thing in BESIDE]
    init = InitImage(image=banana, mask=mask)
    return row([banana, *pipe(prompts, seeds=range(len(BESIDE)), init=init, sampler=RESAMPLE)], 2)


def interpolation(pipe: Pipeline) -> np.ndarray:
    """Between two prompts with one seed, and between two prompts and two seeds."""
    one = edit.interpolate(pipe, ("a snowman", "a crystal ball"), COLUMNS, seeds=(3, 3))
    both = edit.interpolate(pipe, ("a penguin", "an owl"), COLUMNS, seeds=(3, 9))
    return np.concatenate([row(one), row(both)])


def outpainting(pipe: Pipeline, tomato: np.ndarray) -> np.ndarray:
    """A tomato, panned to the right, panned down, and zoomed out."""
    small = np.asarray(Image.fromarray(tomato).resize((48, 48), Image.Resampling.LANCZOS))
    extended = [
        edit.extend(tomato, left=-24, right=24),
        edit.extend(tomato, top=-16, bottom=16),
        edit.extend(small, left=8, right=8, top=8, bottom=8),
    ]
    init = InitImage(
        image=np.stack([one.image for one in extended]),
        mask=np.stack([one.mask for one in extended]),
    )
    prompts = ["a ripe tomato with a stem"] * len(extended)
    return row([tomato, *pipe(prompts, seeds=3, init=init, sampler=RESAMPLE)], 2)


def sizes(pipe: Pipeline) -> np.ndarray:
    """Three images at 16:9."""
    prompts = ["a yellow lemon", "a red pepper", "a blue banana"]
    return row(pipe(prompts, seeds=range(1, 4), size=pipe.size_of("16:9")), 2)


def inversion(pipe: Pipeline, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Images, each beside what its noise generates; print their distances."""
    noise = edit.invert(pipe, images, prompts, num_steps=20)
    sampler = Sampler(solver=DDIM(), num_steps=20)
    back = pipe(prompts, latents=noise, sampler=sampler, guidance_scale=1)
    decoded = pipe.autoencode(images).astype(float)
    error = np.mean((back - decoded) ** 2, axis=(1, 2, 3))
    psnr = np.round(10 * np.log10(255**2 / error), 1)
    print("inverted and generated, PSNR in dB to what the autoencoder reconstructs:", psnr)
    return row(np.stack([images, back], 1).reshape(-1, *images.shape[1:]))


def seamless(pipe: Pipeline) -> np.ndarray:
    """Three tiles, repeated."""
    prompts = ["a green pea", "a large blue banana", "a large ripe tomato"]
    wrapped = Sampler(wrap=(True, True), num_steps=30)
    tiles = pipe(prompts, seeds=(5, 1, 0), sampler=wrapped)
    return row(np.tile(tiles, (1, 3, 3, 1)), 2)[:, : 2 * COLUMNS * tiles.shape[2]]


def upscaling(pipe: Pipeline) -> np.ndarray:
    """Images, each beside its enlargement."""
    prompts = ["a cat to the left of a rocket on blue", "a large tomato on green"]
    small = pipe(prompts, seeds=(5, 4))
    large = edit.upscale(pipe, small, prompts, strength=0.1, guidance_scale=1)
    enlarged = small.repeat(2, 1).repeat(2, 2)
    return row(np.stack([enlarged, large], 1).reshape(-1, *large.shape[1:]))


def main():
    """Generate and write all pictures."""
    pipe, produce = jaxdiff.load(), jaxdiff.load("shipped:produce")
    folder = Path(__file__).parent / "images"
    folder.mkdir(exist_ok=True)
    (tomato,) = pipe("a large tomato", seeds=3)
    (ripe,) = produce("a large ripe tomato with a stem", seeds=3)
    images, prompts = pipe(PROMPTS, seeds=range(len(PROMPTS))), list(PROMPTS)
    strawberry, ends = images[1], (prompts[1], prompts[3])
    varied = edit.variations(
        pipe, strawberry, 0.5, prompts=prompts[1], seeds=range(7), num_steps=20
    )
    blend = edit.interpolate(pipe, ends, COLUMNS, images=images[[1, 3]], num_steps=20)
    pictures = {
        "image_to_image": image_to_image(pipe, tomato),
        "inpainting": inpainting(produce),
        "interpolation": interpolation(pipe),
        "outpainting": outpainting(produce, ripe),
        "sizes": sizes(produce),
        "inversion": inversion(pipe, images, prompts),
        "variations": row([strawberry, *varied]),
        "image_interpolation": row(blend),
        "seamless": seamless(produce),
        "upscaling": upscaling(pipe),
    }
    for name, picture in pictures.items():
        save_png(folder / f"{name}.png", picture)


if __name__ == "__main__":
    main()
