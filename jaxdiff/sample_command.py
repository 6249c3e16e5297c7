"""`sample.py` and `jaxdiff sample`: prompts to PNG files and a grid."""

import dataclasses
import json
import re
import time
from typing import Annotated, Literal

import tyro

from jaxdiff import pictures
from jaxdiff.bundle import make_folder
from jaxdiff.errors import UserError
from jaxdiff.models.tiling import Pieces
from jaxdiff.pipeline import DEFAULT_MODEL, LARGEST_SEED, load
from jaxdiff.sampling.settings import SOLVERS
from jaxdiff.training.step import ComputeType


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Draws images of prompts, with the model that ships with jaxdiff or one of yours."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional]
    """What to draw, each prompt in quotes."""
    model: str = DEFAULT_MODEL
    """Folder of a run, an exported model or a Stable Diffusion checkpoint, `shipped:NAME`, or the
    id OWNER/NAME of a model of the Hugging Face hub."""
    out: str = "samples"
    """Folder for the pictures."""
    seed: int = 0
    """Seed of the first image of each prompt; the next ones count up."""
    num_images: int = 1
    """Images of each prompt."""
    num_steps: int | None = None
    """Steps of the solver; the model's own number by default."""
    guidance_scale: float | None = None
    """How closely to follow the prompt, 1 is unguided; the model's own by default."""
    negative_prompt: str = ""
    """What to steer away from."""
    solver: Literal["ddim", "euler", "heun", "dpm++2m", "plms"] | None = None
    """The model's own by default."""
    size: str | None = None
    """WIDTHxHEIGHT; the training images' by default."""
    dtype: ComputeType | None = None
    """What to compute in; the type of the weights by default, but float32 on a CPU."""
    lora: tuple[str, ...] = ()
    """LoRA files to put on a Stable Diffusion model, each as FILE or FILE:SCALE."""
    embedding: tuple[str, ...] = ()
    """Files of textual inversion, each with a word that prompts may then have."""
    decode_by: Pieces = "whole"
    """What is decoded at a time, for large images: the whole batch, one of its images, or tiles."""
    strip: int = 0
    """Also write a strip of this many estimates on the way from noise to image."""


def draw(options: SampleOptions) -> None:
    """Draws, writes `OUT/0000-the-prompt.png` ... and `OUT/grid.png`, and prints where.

    Raises:
      UserError: no model, no prompt, or settings that do not fit the model.
    """
    if options.num_images < 1:
        raise UserError(f"--num-images is {options.num_images}: expected at least 1.")
    last = LARGEST_SEED - options.num_images + 1
    if not 0 <= options.seed <= last:
        raise UserError(f"--seed is {options.seed}: expected a number from 0 to {last}.")
    if options.strip < 0:
        raise UserError(f"--strip is {options.strip}: expected the number of estimates, or 0.")
    start = time.perf_counter()
    size = _size(options.size)
    folder = make_folder(options.out)
    pipeline = load(options.model, dtype=options.dtype)
    for lora in options.lora:
        file, scale = file_and_scale(lora)
        pipeline = pipeline.with_lora(file, scale=scale, merge=True)
    for file in options.embedding:
        pipeline = pipeline.with_embedding(file)
    prompts = [prompt for prompt in options.prompts for _ in range(options.num_images)]
    seeds = [options.seed + i for _ in options.prompts for i in range(options.num_images)]
    for prompt in options.prompts:
        if pipeline.truncated(prompt):
            print(
                f"The prompt {prompt!r} is longer than the {pipeline.tokenizer.length} tokens that "
                "the text encoder takes: its end is cut off."
            )
    settings = pipeline.config.sampling
    solver = SOLVERS[options.solver]() if options.solver else settings.solver
    scale = settings.guidance_scale if options.guidance_scale is None else options.guidance_scale
    num_steps = settings.num_steps if options.num_steps is None else options.num_steps
    arguments = {
        "negative_prompt": [options.negative_prompt],
        "seeds": seeds,
        "num_steps": num_steps,
        "guidance_scale": scale,
        "solver": solver,
        "size": size,
        "decode_by": options.decode_by,
    }
    images = pipeline(prompts, **arguments)
    for i, (prompt, seed, image) in enumerate(zip(prompts, seeds, images, strict=True)):
        text = {
            "prompt": prompt,
            "seed": str(seed),
            "settings": json.dumps(
                {
                    "negative_prompt": options.negative_prompt,
                    "num_steps": num_steps,
                    "guidance_scale": scale,
                    "solver": type(solver).__name__,
                    "size": f"{image.shape[1]}x{image.shape[0]}",
                }
            ),
            "model": pipeline.config.name,
            "model_fingerprint": pipeline.fingerprint,
        }
        path = folder / f"{i:04d}-{_slug(prompt)}.png"
        pictures.save_png(path, image, text)
        print(path)
    captions = prompts if images.shape[2] >= 48 else None
    pictures.save_png(folder / "grid.png", pictures.grid(images, captions=captions, scale=2))
    print(folder / "grid.png")
    if options.strip:
        snapshots = pipeline(prompts, **arguments, num_snapshots=options.strip)
        pictures.save_png(folder / "strip.png", pictures.strip(snapshots))
        print(folder / "strip.png")
    print(f"{len(images)} images in {time.perf_counter() - start:.1f} s, compile included.")


def file_and_scale(lora: str) -> tuple[str, float]:
    """FILE:SCALE, or FILE for a scale of 1."""
    file, _, scale = lora.rpartition(":")
    try:
        return (file, float(scale)) if file else (lora, 1.0)
    except ValueError:  # a colon of the path, as in gs://
        return lora, 1.0


def _slug(prompt: str) -> str:
    """A prompt as part of a file name: letters and digits only, so that it stays in its folder."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "prompt"


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise UserError(f"--size is {text!r}: expected WIDTHxHEIGHT, such as 64x64.")
    return int(match[1]), int(match[2])
