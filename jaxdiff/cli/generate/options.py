"""What `sample.py` and `jaxdiff sample` may be told, and the model that they are told of."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import jax
import numpy as np
import tyro
from etils import epath

from jaxdiff.cli.generate.image_files import Format
from jaxdiff.cli.generate.prompt_file import CHECKS, PATHS, Row, checked, flag
from jaxdiff.cli.generate.settings import Fixed
from jaxdiff.distributed.distributed_init import Hosts
from jaxdiff.errors import UserError
from jaxdiff.io import images as pictures
from jaxdiff.models.autoencoders.tiling import VaeMode
from jaxdiff.pipelines.batching import Preview
from jaxdiff.pipelines.pipeline import DEFAULT_MODEL, Pipeline, load
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.sampling.sampler import SOLVERS
from jaxdiff.training.step import ComputeType

LARGEST_PREVIEW = 16  # images


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Draws images of prompts, with the model that ships with jaxdiff or one of yours.

    The exit status is 0 if all was drawn, 1 if rows of --prompts could not be or if --again made
    other pixels, and 2 for a mistake that nothing could be drawn for.
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What to draw, each prompt in quotes."""
    prompts: Annotated[
        str | None,
        tyro.conf.arg(
            help="File of prompts: .jsonl with an object a line, .csv with a header, or .txt with "
            f"a prompt a line. A row may set {', '.join(CHECKS)}; what it leaves out is as the "
            "other flags say. Paths are relative to the folder of the file. Each image has a line "
            "in OUT/manifest.jsonl; the same command goes on where it was. Rows that cannot be "
            "drawn are told, and make the exit status 1."
        ),
    ] = None
    again: str | None = None
    """PNG or WebP file that sample.py wrote, to be drawn again from its text; --model must be the
    one that made it."""
    model: str = DEFAULT_MODEL
    """Folder of a run, an exported model or a Stable Diffusion checkpoint, `shipped:NAME`, or the
    id OWNER/NAME of a model of the Hugging Face hub."""
    out: str = "samples"
    """Folder for the pictures."""
    format: Format = "png"
    """Of the image files: png, webp, which is lossless as well, or jpg."""
    seed: int = 0
    """Seed of the first image of each prompt; the next ones count up."""
    num_images: int = 1
    """Images of each prompt."""
    best_of: int | None = None
    """Draw this many for each image and keep the one, with its seed, that the CLIP of --clip-model
    finds closest to the prompt."""
    num_steps: int | None = None
    """Steps of the solver; the model's own number by default."""
    guidance_scale: float | None = None
    """How closely to follow the prompt, 1 is unguided; the model's own by default."""
    guidance_interval: str | None = None
    """Times LOW-HIGH, 1 being noise and 0 the image, outside of which there is no guidance, and the
    model has half to do; the model's own, mostly 0-1, by default."""
    guidance_rescale: float | None = None
    """How far the contrast that guidance adds is taken back, from 0 to 1."""
    apg: float | None = None
    """Adaptive projected guidance: what counts of its part that makes for saturation, from 0, as in
    the paper, to 1, as ever."""
    zero_star: int | None = None
    """CFG-Zero*, for flow models: how many steps at the start are not taken, 1 in the paper."""
    weak_model: str | None = None
    """A weaker model of the same kind, such as an earlier run, to steer away from."""
    weak_scale: float | None = None
    """How far from it; 1 is not at all, and 1.5 the default."""
    negative_prompt: str = ""
    """What to steer away from."""
    solver: Annotated[
        str | None, tyro.conf.arg(help=f"{', '.join(SOLVERS)}; the model's own by default.")
    ] = None
    size: str | None = None
    """WIDTHxHEIGHT, or a ratio such as 16:9 for the size that the model draws best of it; that of
    --init-image, or else the training images', by default."""
    seamless: bool = False
    """Draw tiles: images that go on at their other side, as on a wallpaper."""
    upscale: int | None = None
    """Enlarge what was drawn so many times, and draw its detail anew through windows."""
    upscale_strength: float | None = None
    """How much of it may change then, from 0 to 1; 0.35 by default."""
    init_image: str | None = None
    """File of an image to start from."""
    strength: float | None = None
    """How far the image is taken back to noise, from 0 to 1, and so how much it may change."""
    variation: float | None = None
    """Rather than that: find the noise that the image is drawn from, and turn it so far toward that
    of the seed, from 0 to 1; unguided unless --guidance-scale is given."""
    mask: str | None = None
    """File of a mask: what is white there is drawn anew, and what is black is kept."""
    clip_scale: float | None = None
    """How strongly a CLIP steers every step toward the prompt; not at all by default."""
    clip_interval: str | None = None
    """Times LOW-HIGH between which it does, 1 being noise and 0 the image; 0-1 by default."""
    clip_cutouts: int | None = None
    """Random squares that CLIP looks at in the place of the whole image."""
    clip_model: str = ClipGuidance.model
    """Folder of a CLIP (a run, exported, or of transformers), `shipped:NAME` or the hub's
    OWNER/NAME; for --best-of too."""
    repeats: int | None = None
    """How often each step is taken, going back up by fresh noise in between; 1 by default."""
    toward: str | None = None
    """Another prompt, to mix into the prompt."""
    toward_seed: int | None = None
    """Seed of the noise toward which the noise is turned with it; the image's own by default."""
    share: float | None = None
    """Of both in the mixture, from 0 to 1; half by default."""
    between: int = 0
    """Draw this many images on the way from the first prompt to the second, and a film of them."""
    dtype: ComputeType | None = None
    """What to compute in; the type of the weights by default, but float32 on a CPU."""
    lora: tuple[str, ...] = ()
    """LoRA files to put on a Stable Diffusion model, each as FILE or FILE:SCALE."""
    embedding: tuple[str, ...] = ()
    """Files of textual inversion, each with a word that prompts may then have."""
    decode_by: VaeMode = "whole"
    """What is decoded at a time, for large images: the whole batch, one of its images, or tiles."""
    grid: bool = False
    """Also write a grid of the images of --prompts; prompts on the command line always have one."""
    strip: int = 0
    """Also write a strip of this many estimates on the way from noise to image."""
    preview: int = 0
    """Steps between two looks at the images under way, which are written to OUT/preview.png."""
    preview_decoder: str | None = None
    """Folder or hub id of a tiny autoencoder to decode them by; the model's own by default."""
    hosts: Hosts = dataclasses.field(default_factory=Hosts)


# What does not say how an image is drawn but with what, or where it goes.
_NOT_OF_AN_IMAGE = {
    "again",
    "hosts",
    "model",
    "out",
    "init_image",
    "mask",
    "clip_model",
    "weak_model",
    "dtype",
    "lora",
    "embedding",
}


_APART = (
    ("strip", "prompts"),
    ("strip", "variation"),
    ("between", "prompts"),
    ("between", "toward"),
    ("between", "share"),
    ("between", "num_images"),
    ("between", "best_of"),
    ("seamless", "decode_by"),
)
"""Flags of which one alone may be given; those that rows may set too are checked there."""


def check(options: SampleOptions) -> None:
    """Raises `UserError` for flags that exclude each other or have no such value."""
    kinds = [bool(options.prompt), options.prompts is not None, options.again is not None]
    if sum(kinds) > 1:
        raise UserError("A prompt, --prompts and --again exclude each other: give one of them.")
    if options.num_images < 1:
        raise UserError(f"--num-images is {options.num_images}: expected at least 1.")
    for name, what in (("strip", "estimates"), ("preview", "steps"), ("between", "images")):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} is {getattr(options, name)}: expected how many {what}.")
    given = {f.name for f in dataclasses.fields(options) if getattr(options, f.name) != f.default}
    apart = [(name, "again") for name in sorted(given - _NOT_OF_AN_IMAGE)]
    for one, other in (*_APART, *apart):
        if {one, other} <= given:
            raise UserError(
                f"{flag(one)} and {flag(other)} exclude each other: leave one of them out."
            )
    if options.between and (options.between == 1 or len(options.prompt) != 2):
        raise UserError(
            f"--between {options.between} with {len(options.prompt)} prompts: expected at least 2 "
            "images on the way from one prompt to another."
        )
    if options.preview_decoder is not None and not options.preview:
        raise UserError("--preview-decoder is about --preview: give that as well.")


def defaults(options: SampleOptions) -> Row:
    """What the command line says of images, checked as the rows of a file are.

    Raises:
      UserError: there is no such value.
    """
    names = [name for name in CHECKS if name not in ("prompt", "name")]
    found = checked({name: getattr(options, name) for name in names}, called=flag)
    for name in PATHS:
        if name in found:
            found[name] = epath.Path(found[name])
    return Row(prompt="", **found)


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
    return pipeline.seamless() if options.seamless else pipeline


def fixed(options: SampleOptions) -> Fixed:
    """What rows cannot set."""
    return Fixed(
        decode_by=options.decode_by,
        clip_model=options.clip_model,
        weak_model=options.weak_model,
    )


def preview(options: SampleOptions, pipeline: Pipeline, folder: epath.Path) -> Preview | None:
    """What writes `OUT/preview.png` from time to time, if that is asked for.

    Raises:
      UserError: the autoencoder to decode by cannot be read, or is for other latents.
    """
    if not options.preview:
        return None
    alone = jax.process_count() == 1
    path = folder / ("preview.png" if alone else f"preview.{jax.process_index()}.png")

    def show(_: Sequence[int], images: np.ndarray) -> None:
        pictures.save_png(path, pictures.grid(images[:LARGEST_PREVIEW]))

    decoder = options.preview_decoder and pipeline.with_autoencoder(options.preview_decoder)
    return Preview(every=options.preview, show=show, decoder=decoder or None)


def file_and_scale(lora: str) -> tuple[str, float]:
    """FILE:SCALE, or FILE for a scale of 1."""
    file, _, scale = lora.rpartition(":")
    try:
        return (file, float(scale)) if file else (lora, 1.0)
    except ValueError:  # a colon of the path, as in gs://
        return lora, 1.0
