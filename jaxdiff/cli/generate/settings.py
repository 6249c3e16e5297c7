"""All that an image is made of beside the model."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from jaxdiff.cli.generate.prompt_file import LARGEST_SIDE, PATHS, Row, flag
from jaxdiff.errors import UserError
from jaxdiff.io import images as pictures
from jaxdiff.models.autoencoders.tiling import VaeMode
from jaxdiff.pipelines.edit import UPSCALE_STRENGTH
from jaxdiff.pipelines.inputs import IMAGE_STRENGTH, LARGEST_SEED
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.autoguidance import Autoguidance
from jaxdiff.sampling.guidance.cfg import Guidance
from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.sampling.sampler import SOLVERS
from jaxdiff.sampling.solvers_ode import DDIM, Solver

# Values of columns that do nothing.
_NEUTRAL = {"clip_scale": 0.0, "repeats": 1, "weak_scale": 1.0, "upscale": 1, "best_of": 1}

# Columns that are about what another one gives.
_ABOUT = {
    "init_image": ("an image", ("mask", "strength", "variation")),
    "clip_scale": ("CLIP", ("clip_interval", "clip_cutouts")),
    "toward": ("another prompt", ("toward_seed", "share")),
    "upscale": ("enlarging", ("upscale_strength",)),
}

_APART = {
    "variation": (
        ("mask", "strength", "solver", "toward", "clip_scale", "repeats", "weak_scale"),
        "a variation is drawn by DDIM from the noise of the image, looked for without all that",
    ),
    "upscale": (("mask",), "what is enlarged is drawn anew, and what a mask keeps is not"),
}
"""Columns with others that they exclude, and why."""


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


class Mixed(NamedTuple):
    """What is mixed into a prompt and its noise."""

    toward: str  # another prompt
    seed: int  # of its noise
    share: float  # of both, from 0 to 1


class Enlarged(NamedTuple):
    """How what was drawn is enlarged."""

    factor: int  # by which its sides get longer
    strength: float  # how much of it is then drawn anew, from 0 to 1


class Choice(NamedTuple):
    """Of how many images, their seeds counting up, a CLIP keeps one."""

    of: int
    clip: str  # which one


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
    decode_by: VaeMode = "whole"
    init_image: InputFile | None = None
    strength: float | None = None
    mask: InputFile | None = None
    clip: ClipGuidance | None = None
    repeats: int = 1
    mixed: Mixed | None = None
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    weak: Autoguidance | None = None
    variation: float | None = None
    enlarged: Enlarged | None = None
    choice: Choice | None = None

    @property
    def drawn_size(self) -> tuple[int, int]:
        """Width and height of the image in the end."""
        factor = self.enlarged.factor if self.enlarged else 1
        return self.size[0] * factor, self.size[1] * factor

    @property
    def shape_group(self) -> tuple[Any, ...]:
        """Settings that differ in this compile a loop each."""
        clip = self.clip and dataclasses.replace(self.clip, scale=0.0)
        maybe = (self.init_image, self.mask, self.mixed, self.variation, self.weak)
        given = (one is None for one in maybe)
        sizes = self.size, self.drawn_size
        return self.solver, *sizes, self.decode_by, *given, clip, self.repeats, self.guidance

    @property
    def call_group(self) -> tuple[Any, ...]:
        """Settings that differ in this are not drawn by one call; those of a loop may be."""
        return *self.shape_group, self.clip, self.weak, self.choice

    @property
    def batch_group(self) -> tuple[Any, ...]:
        """Settings that differ in this are not drawn by one device at a time."""
        return *self.call_group, self.num_steps, self.strength, self.enlarged

    def copies(self, count: int) -> list["ImageSettings"]:
        """So many of these, their seeds counting up so that none is drawn twice.

        Raises:
          UserError: there are not so many seeds.
        """
        tried = self.choice.of if self.choice else 1
        last = LARGEST_SEED - count * tried + 1
        if self.seed > last:
            raise UserError(f"seed is {self.seed}: expected a number from 0 to {last}.")
        seeds = range(self.seed, self.seed + count * tried, tried)
        return [dataclasses.replace(self, seed=seed) for seed in seeds]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
    """What rows cannot set, and all images of a command share."""

    decode_by: VaeMode = "whole"
    clip_model: str = ClipGuidance.model
    weak_model: str | None = None


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
    recipe = pipeline.config.sampling
    values = _values(row, defaults, fixed)
    inputs = {name: values[name] and opened(values[name]) for name in PATHS}
    varied, name = values["variation"] is not None, values["solver"]
    scale = 1.0 if varied else recipe.guidance_scale  # more would lead away from the image
    settings = ImageSettings(
        prompt=row.prompt,
        negative_prompt=values["negative_prompt"] or "",
        seed=values["seed"] or 0,
        num_steps=_either(values["num_steps"], recipe.num_steps),
        guidance_scale=float(_either(values["guidance_scale"], scale)),
        size=_size(values["size"], inputs, pipeline),
        solver=SOLVERS[name]() if name else DDIM() if varied else recipe.solver,
        decode_by=fixed.decode_by,
        strength=_strength(values, inputs),
        clip=_clip(values, fixed.clip_model),
        repeats=_either(values["repeats"], 1),
        mixed=_mixed(values),
        guidance=_guidance(values, recipe.guidance),
        weak=_weak(values["weak_scale"], fixed.weak_model),
        variation=values["variation"],
        enlarged=_enlarged(values),
        choice=Choice(of=values["best_of"], clip=fixed.clip_model) if values["best_of"] else None,
        **inputs,
    )
    settings.guidance.check_steps(settings.num_steps)
    if max(settings.drawn_size) > LARGEST_SIDE:
        width, height = settings.drawn_size
        raise UserError(
            f"The image would be {width}x{height}: expected at most {LARGEST_SIDE} pixels a side."
        )
    return settings


def _values(row: Row, defaults: Row, fixed: Fixed) -> dict[str, Any]:
    """What a row says, or else the defaults; None where it would do nothing.

    Raises:
      UserError: columns that exclude each other, or that are about what is not there.
    """
    called = str if row.line else flag  # a row without a line is the command line itself
    values = {
        f.name: _either(getattr(row, f.name), getattr(defaults, f.name))
        for f in dataclasses.fields(Row)
    }
    if values["weak_scale"] is None and fixed.weak_model is not None:
        values["weak_scale"] = Autoguidance.scale
    for name, neutral in _NEUTRAL.items():
        values[name] = None if values[name] == neutral else values[name]
    if values["weak_scale"] is not None and fixed.weak_model is None:
        raise UserError(f"{called('weak_scale')} is about a weaker model: give --weak-model.")
    for needed, (what, names) in _ABOUT.items():
        wrong = [called(name) for name in names if getattr(row, name) is not None]
        if values[needed] is None and wrong:
            raise UserError(f"{wrong[0]} is about {what}: give {called(needed)} as well.")
        if values[needed] is None:
            values |= dict.fromkeys(names)  # the defaults are for the rows that have one
    for name, (others, why) in _APART.items():
        wrong = [called(other) for other in others if values[other] is not None]
        if values[name] is not None and wrong:
            raise UserError(f"{called(name)} and {wrong[0]} exclude each other: {why}.")
    return values


def _either(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _size(
    asked: tuple[int, int] | str | None, inputs: dict[str, InputFile | None], pipeline: Pipeline
) -> tuple[int, int]:
    if isinstance(asked, str):
        asked = pipeline.size_of(asked)
    image = inputs["init_image"]
    size = asked or (image.size if image else (pipeline.image_size, pipeline.image_size))
    for what, file in (("image", image), ("mask", inputs["mask"])):
        if file and file.size != size:
            raise UserError(
                f"The {what} {file.path.name} is {file.size[0]}x{file.size[1]}, not "
                f"{size[0]}x{size[1]} as what is to be drawn: resize it, or set another size."
            )
    return size


def _strength(values: dict[str, Any], inputs: dict[str, InputFile | None]) -> float | None:
    """Stated even where it is the default, for whoever reads the file."""
    if inputs["init_image"] is None or values["variation"] is not None:
        return None
    return _either(values["strength"], 1.0 if inputs["mask"] else IMAGE_STRENGTH)


def _guidance(values: dict[str, Any], recipe: Guidance) -> Guidance:
    eta, zero_steps = values["apg"], values["zero_star"]
    apg, zero_star = recipe.apg, recipe.zero_star
    if eta is not None:
        apg = dataclasses.replace(apg or APG(), eta=eta)
    if zero_steps is not None:
        zero_star = dataclasses.replace(zero_star or CFGZeroStar(), zero_steps=zero_steps)
    return Guidance(
        interval=_either(values["guidance_interval"], recipe.interval),
        rescale=_either(values["guidance_rescale"], recipe.rescale),
        apg=apg,
        zero_star=zero_star,
    )


def _clip(values: dict[str, Any], model: str) -> ClipGuidance | None:
    if values["clip_scale"] is None:
        return None
    return ClipGuidance(
        model=model,
        scale=values["clip_scale"],
        interval=values["clip_interval"] or (0.0, 1.0),
        cutouts=values["clip_cutouts"] or 0,
    )


def _mixed(values: dict[str, Any]) -> Mixed | None:
    if values["toward"] is None:
        return None
    seed = _either(values["toward_seed"], values["seed"] or 0)
    return Mixed(toward=values["toward"], seed=seed, share=_either(values["share"], 0.5))


def _weak(scale: float | None, model: str | None) -> Autoguidance | None:
    return None if scale is None or model is None else Autoguidance(model=model, scale=scale)


def _enlarged(values: dict[str, Any]) -> Enlarged | None:
    if values["upscale"] is None:
        return None
    strength = _either(values["upscale_strength"], UPSCALE_STRENGTH)
    return Enlarged(factor=values["upscale"], strength=strength)
