"""All that an image is made of beside the model."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxdiff import pictures
from jaxdiff.asked import IMAGE_STRENGTH
from jaxdiff.batches import Preview
from jaxdiff.errors import UserError
from jaxdiff.models.tiling import Pieces
from jaxdiff.pipeline import Pipeline
from jaxdiff.sampling.clip_guidance import ClipGuidance
from jaxdiff.sampling.settings import SOLVERS
from jaxdiff.sampling.solvers import Solver
from jaxdiff.scripts.prompt_file import Row


class InputFile(NamedTuple):
    """An image to start from, or a mask."""

    path: epath.Path
    sha256: str
    size: tuple[int, int]


def open_input(path: epath.PathLike) -> InputFile:
    """Reads an image once to know that it can be read, and what it is.

    Raises:
      UserError: it cannot be read.
    """
    try:
        data = epath.Path(path).read_bytes()
    except (OSError, ValueError):
        data = None  # for read_picture to complain of
    height, width, _ = pictures.read_picture(path, data).shape
    digest = hashlib.sha256(data or b"").hexdigest()
    return InputFile(epath.Path(path), digest, (width, height))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """What is mixed into a prompt and its noise.

    Attributes:
      toward: another prompt.
      seed: of its noise.
      share: of both, from 0 to 1.
    """

    toward: str
    seed: int
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """What one image is drawn by."""

    prompt: str
    negative_prompt: str
    seed: int
    num_steps: int
    guidance_scale: float
    size: tuple[int, int]
    solver: Solver
    decode_by: Pieces = "whole"
    init_image: InputFile | None = None
    strength: float | None = None
    mask: InputFile | None = None
    clip: ClipGuidance | None = None
    repeats: int = 1
    mixed: Mixed | None = None

    @property
    def shape_group(self) -> tuple[Any, ...]:
        """Settings that differ in this compile a loop each."""
        clip = self.clip and dataclasses.replace(self.clip, scale=0.0)
        given = (self.init_image is None, self.mask is None, self.mixed is None)
        return self.solver, self.size, self.decode_by, *given, clip, self.repeats

    @property
    def call_group(self) -> tuple[Any, ...]:
        """Settings that differ in this are not drawn by one call; those of a loop may be."""
        return *self.shape_group, self.clip

    @property
    def batch_group(self) -> tuple[Any, ...]:
        """Settings that differ in this are not drawn by one device at a time."""
        return *self.call_group, self.num_steps, self.strength


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
    """What rows cannot set, and all images of a command share."""

    decode_by: Pieces = "whole"
    clip_model: str = ClipGuidance.model


def settle(
    row: Row,
    defaults: Row,
    pipeline: Pipeline,
    fixed: Fixed = Fixed(),
    *,
    opened: Callable[[epath.Path], InputFile] = open_input,
) -> ImageSettings:
    """What the first image of a row is drawn by; the seeds of further ones count up.

    What the row leaves out comes from `defaults`, and what these do from the model's recipe.
    `opened` may remember what it has opened before: all rows may have the same image.

    Raises:
      UserError: an image cannot be read, or is not of the size of the result or of its mask.
    """

    def chosen(name: str, otherwise: Any = None) -> Any:
        values = (getattr(row, name), getattr(defaults, name))
        return next((value for value in values if value is not None), otherwise)

    recipe = pipeline.config.sampling
    name = chosen("solver")
    image, mask, strength = chosen("init_image"), chosen("mask"), chosen("strength")
    if image is None:
        if row.mask is not None or row.strength is not None:
            raise UserError("mask and strength are about an image: give init_image as well.")
        mask = strength = None  # the defaults are for the rows that have one
    elif strength is None:
        strength = IMAGE_STRENGTH if mask is None else 1.0  # stated, for whoever reads the file
    image = image and opened(image)
    mask = mask and opened(mask)
    own = (pipeline.image_size, pipeline.image_size)
    size = chosen("size", image.size if image else own)
    for what, file in (("image", image), ("mask", mask)):
        if file and file.size != size:
            raise UserError(
                f"The {what} {file.path.name} is {file.size[0]}x{file.size[1]}, not "
                f"{size[0]}x{size[1]} as what is to be drawn: resize it, or set another size."
            )
    seed = chosen("seed", 0)
    return ImageSettings(
        prompt=row.prompt,
        negative_prompt=chosen("negative_prompt", ""),
        seed=seed,
        num_steps=chosen("num_steps", recipe.num_steps),
        guidance_scale=float(chosen("guidance_scale", recipe.guidance_scale)),
        size=size,
        solver=SOLVERS[name]() if name else recipe.solver,
        decode_by=fixed.decode_by,
        init_image=image,
        strength=strength,
        mask=mask,
        clip=_clip(row, chosen, fixed.clip_model),
        repeats=chosen("repeats", 1),
        mixed=_mixed(row, chosen, seed),
    )


def _clip(row: Row, chosen: Callable[..., Any], model: str) -> ClipGuidance | None:
    scale = chosen("clip_scale", 0.0)
    if scale == 0:
        if row.clip_interval is not None or row.clip_cutouts is not None:
            raise UserError("clip_interval and clip_cutouts are about CLIP: give clip_scale.")
        return None
    interval, cutouts = chosen("clip_interval", (0.0, 1.0)), chosen("clip_cutouts", 0)
    return ClipGuidance(model=model, scale=scale, interval=interval, cutouts=cutouts)


def _mixed(row: Row, chosen: Callable[..., Any], seed: int) -> Mixed | None:
    toward = chosen("toward")
    if toward is None:
        if row.toward_seed is not None or row.share is not None:
            raise UserError("toward_seed and share are about another prompt: give toward.")
        return None
    return Mixed(toward=toward, seed=chosen("toward_seed", seed), share=chosen("share", 0.5))


def draw_together(
    pipeline: Pipeline,
    settings: Sequence[ImageSettings],
    *,
    num_snapshots: int = 0,
    preview: Preview | None = None,
) -> np.ndarray:
    """Images uint8 [n, h, w, 3] of settings of one `call_group`; with snapshots [k, n, h, w, 3].

    Raises:
      UserError: they do not fit the model, or an image is gone or was changed.
    """
    first = settings[0]
    inputs: dict[str, Any] = {}
    if first.init_image is not None:
        inputs["image"] = np.stack([_pixels(s.init_image) for s in settings])
        inputs["strength"] = [s.strength for s in settings]
    if first.mask is not None:
        inputs["mask"] = np.stack([_pixels(s.mask).mean(-1) / 255 for s in settings])
    if first.mixed is not None:
        mixtures = [s.mixed for s in settings if s.mixed is not None]
        inputs["toward"] = [mixed.toward for mixed in mixtures]
        inputs["share"] = [mixed.share for mixed in mixtures]
        inputs["latents"] = pipeline.noise(
            [s.seed for s in settings],
            toward=[mixed.seed for mixed in mixtures],
            amount=inputs["share"],
            size=first.size,
        )
    return pipeline(
        [s.prompt for s in settings],
        negative_prompt=[s.negative_prompt for s in settings],
        seeds=[s.seed for s in settings],
        num_steps=[s.num_steps for s in settings],
        guidance_scale=[s.guidance_scale for s in settings],
        solver=first.solver,
        size=first.size,
        num_snapshots=num_snapshots,
        decode_by=first.decode_by,
        clip=first.clip,
        repeats=first.repeats,
        preview=preview,
        **inputs,
    )


def _pixels(file: InputFile | None) -> pictures.Picture:
    assert file is not None  # those drawn together all have one
    picture = pictures.read_picture(file.path)
    if picture.shape[1::-1] != file.size:
        raise UserError(f"{file.path} was changed since the start: start again.")
    return picture
