"""What `sample.py` and `jaxdiff sample` may be told, and the model that they are told of."""

import dataclasses
from typing import Annotated

import tyro
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.models.tiling import Pieces
from jaxdiff.pipeline import DEFAULT_MODEL, LARGEST_SEED, Pipeline, load
from jaxdiff.prompt_file import CHECKS, Row
from jaxdiff.sampling.settings import SOLVERS
from jaxdiff.training.step import ComputeType


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Draws images of prompts, with the model that ships with jaxdiff or one of yours.

    The exit status is 0 if all was drawn, 1 if rows of --prompts could not be or if --again made
    other pixels, and 2 for a mistake that nothing could be drawn for.
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What to draw, each prompt in quotes."""
    prompts: str | None = None
    """File of prompts: .jsonl with an object a line, .csv with a header, or .txt with a prompt a
    line. A row may set prompt, name, negative_prompt, seed, size, num_steps, guidance_scale,
    solver, image, mask and strength; what it leaves out is as the other flags say. Paths are
    relative to the folder of the file. Each image has a line in OUT/manifest.jsonl; the same
    command goes on where it was. Rows that cannot be drawn are told, and make the exit status 1."""
    again: str | None = None
    """PNG file that sample.py wrote, to be drawn again from its text; --model must be the one that
    made it."""
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
    solver: Annotated[
        str | None, tyro.conf.arg(help=f"{', '.join(SOLVERS)}; the model's own by default.")
    ] = None
    size: str | None = None
    """WIDTHxHEIGHT; that of --image, or else the training images', by default."""
    image: str | None = None
    """File of an image to start from."""
    mask: str | None = None
    """File of a mask: what is white there is drawn anew, and what is black is kept."""
    strength: float | None = None
    """How far the image is taken back to noise, from 0 to 1, and so how much it may change."""
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


# What does not say how an image is drawn but with what, or where it goes.
_NOT_OF_AN_IMAGE = {"again", "model", "out", "image", "mask", "dtype", "lora", "embedding"}


def check(options: SampleOptions) -> None:
    """Raises `UserError` for flags that exclude each other or have no such value."""
    kinds = [bool(options.prompt), options.prompts is not None, options.again is not None]
    if sum(kinds) > 1:
        raise UserError("A prompt, --prompts and --again exclude each other: give one of them.")
    if options.num_images < 1:
        raise UserError(f"--num-images is {options.num_images}: expected at least 1.")
    last = LARGEST_SEED - options.num_images + 1
    if not 0 <= options.seed <= last:
        raise UserError(f"--seed is {options.seed}: expected a number from 0 to {last}.")
    if options.strip < 0:
        raise UserError(f"--strip is {options.strip}: expected the number of estimates, or 0.")
    if options.prompts is not None and options.strip:
        raise UserError("--strip is for prompts on the command line: leave it or --prompts out.")
    about_image = options.mask is not None or options.strength is not None
    if options.image is None and about_image and kinds[0]:
        raise UserError("--mask and --strength are about an image: give --image as well.")
    if options.again is not None:
        for f in dataclasses.fields(options):
            if f.name not in _NOT_OF_AN_IMAGE and getattr(options, f.name) != f.default:
                flag = f.name.replace("_", "-")
                raise UserError(
                    f"--{flag} and --again exclude each other: --again takes from the file how it "
                    "was made; leave one of them out."
                )


def defaults(options: SampleOptions) -> Row:
    """What the command line says of images, checked as the rows of a file are.

    Raises:
      UserError: there is no such value.
    """
    names = [name for name in CHECKS if name not in ("prompt", "name")]
    given = {name: getattr(options, name) for name in names}
    checked = {
        name: CHECKS[name](f"--{name.replace('_', '-')}", value)
        for name, value in given.items()
        if value is not None
    }
    for name in ("image", "mask"):
        if name in checked:
            checked[name] = epath.Path(checked[name])
    return Row(prompt="", **checked)


def open_pipeline(options: SampleOptions, dtype: ComputeType | None = None) -> Pipeline:
    """The model that the options name, with its adapters and words.

    Args:
      options: of the command.
      dtype: what to compute in unless they say.

    Raises:
      UserError: it cannot be read, or they are for another one.
    """
    pipeline = load(options.model, dtype=options.dtype or dtype)
    for lora in options.lora:
        file, scale = file_and_scale(lora)
        pipeline = pipeline.with_lora(file, scale=scale, merge=True)
    for file in options.embedding:
        pipeline = pipeline.with_embedding(file)
    return pipeline


def file_and_scale(lora: str) -> tuple[str, float]:
    """FILE:SCALE, or FILE for a scale of 1."""
    file, _, scale = lora.rpartition(":")
    try:
        return (file, float(scale)) if file else (lora, 1.0)
    except ValueError:  # a colon of the path, as in gs://
        return lora, 1.0
