"""`GenerationSettings`: the options of an image, and the rules between them.

Flags, columns of prompt files, the JSON in image files and grouping derive from its fields. A new
option is one field here and its use: in `pipelines/resolve.py` if it sets the sampler, else in
`pipelines/generate.py`.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from etils import epath

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import (
    LARGEST_FLOAT,
    LARGEST_INT,
    LARGEST_SEED,
    Choices,
    Doc,
    File,
    Files,
    Interval,
    Range,
    Size,
    Switch,
    Text,
    check_fields,
    fields_of,
)
from jaxdiff.diffusion.time_grids import MOST_STEPS
from jaxdiff.errors import UserError
from jaxdiff.sampling.solvers import SOLVERS

LARGEST_SIDE = 8192  # pixels; a longer side, most likely a typo, exhausts memory

PROMPTS, SAMPLING, GUIDANCE, EDITING = "Prompts and output", "Sampling", "Guidance", "Editing"
"""Groups of options in the long help."""


class Varies(enum.IntEnum):
    """The scope in which images share a field's value.

    PROGRAM: another value compiles another program; the default.
    CALL: one value per call of the pipeline.
    BATCH: one value per batch of a device.
    IMAGE: one value per image; all or none have one.
    FREE: one value per image, or none.
    """

    PROGRAM = 0
    CALL = 1
    BATCH = 2
    IMAGE = 3
    FREE = 4


class Requires(NamedTuple):
    """A field requires another one; `default` applies where that is set."""

    name: str
    default: Any = None


class NoOp(NamedTuple):
    """A value without effect, equivalent to None."""

    value: Any


@checked
@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The options of an image; None inherits, ultimately from the model."""

    prompt: Annotated[
        str,
        Text(empty=True),
        Doc("What to generate, each prompt in quotes.", PROMPTS, common=True),
        Varies.IMAGE,
    ] = ""
    negative_prompt: Annotated[
        str | None,
        Text(empty=True),
        Doc("What the images are guided away from.", PROMPTS, common=True),
        Varies.FREE,
    ] = None
    seed: Annotated[
        int | None,
        Range(0, LARGEST_SEED),
        Doc("Seed of each prompt's first image, 0 by default. Others count up.", PROMPTS, True),
        Varies.IMAGE,
    ] = None
    name: Annotated[
        str | None,
        Text(number=True),
        Doc("Name of the file, instead of a number.", PROMPTS),
        Varies.FREE,
    ] = None
    num_steps: Annotated[
        int | None,
        Range(1, MOST_STEPS),
        Doc("Steps of the solver.", SAMPLING, common=True),
        Varies.BATCH,
    ] = None
    guidance_scale: Annotated[
        float | None,
        Range(),
        Doc(
            "Prompt adherence; 1 is unguided. So is less, for Stable Diffusion.",
            SAMPLING,
            common=True,
        ),
        Varies.IMAGE,
    ] = None
    true_cfg_scale: Annotated[
        float | None,
        Range(),
        Doc(
            "Classifier-free guidance of distilled models such as FLUX.1, which need none; then "
            "--negative-prompt has an effect.",
            GUIDANCE,
        ),
        Varies.CALL,
    ] = None
    size: Annotated[
        tuple[int, int] | str | None,
        Size(LARGEST_SIDE),
        Doc(
            "WIDTHxHEIGHT, or a ratio such as 16:9. By default that of --init-image, or of the "
            "training images.",
            SAMPLING,
            common=True,
        ),
    ] = None
    solver: Annotated[
        str | None,
        Choices(tuple(SOLVERS)),
        Doc(f"ODE or SDE solver, such as dpm++2m. One of {', '.join(SOLVERS)}.", SAMPLING, True),
    ] = None
    resample_steps: Annotated[
        int | None,
        Range(1, 1000),
        Doc("Times that each step is taken, with fresh noise in between (RePaint).", SAMPLING),
    ] = None
    vae_mode: Annotated[
        str | None,
        Choices(("full", "slicing", "tiling")),
        Doc(
            "What the autoencoder decodes at a time: full, the whole batch; slicing, one image; "
            "tiling, one tile of an image.",
            SAMPLING,
        ),
    ] = None
    cache_interval: Annotated[
        int | None,
        Range(1, 1000),
        Doc(
            "Evaluate all of the network at every so many steps, most of it predicted in between "
            "(TaylorSeer): 2 to 4. 1 is exact.",
            SAMPLING,
        ),
    ] = None
    cache_threshold: Annotated[
        float | None,
        Range(0, LARGEST_FLOAT, "(]"),
        Doc(
            "Evaluate all of the network where its first block changes by more (first-block "
            "cache): 0.05 to 0.2.",
            SAMPLING,
        ),
    ] = None
    seamless: Annotated[
        bool | None, Switch(), Doc("Generate tiles that continue at their other side.", SAMPLING)
    ] = None
    best_of: Annotated[
        int | None,
        Range(1, 1000),
        Doc(
            "Generate this many for each image, keep the best. The CLIP of --clip-model ranks "
            "them, and the file states the seed of the one that is kept.",
            SAMPLING,
            common=True,
        ),
        Varies.CALL,
        NoOp(1),
    ] = None
    refiner_start: Annotated[
        float | None,
        Range(0, 1, "()"),
        Doc("Share of the steps after which --refiner-model takes over; 0.8 by default.", SAMPLING),
        Varies.CALL,
    ] = None
    guidance_interval: Annotated[
        tuple[float, float] | None,
        Interval(),
        Doc("Times, 1 being noise and 0 the image, at which guidance acts.", GUIDANCE),
    ] = None
    guidance_rescale: Annotated[
        float | None,
        Range(0, 1),
        Doc("How far the contrast that guidance adds is taken back.", GUIDANCE),
    ] = None
    apg: Annotated[
        float | None,
        Range(0, 1),
        Doc(
            "Adaptive projected guidance: weight of the parallel component, which raises "
            "saturation; 0 in the paper, 1 for no effect.",
            GUIDANCE,
        ),
    ] = None
    cfg_zero_star: Annotated[
        int | None,
        Range(0, LARGEST_INT),
        Doc("CFG-Zero*, for flow models: steps at the start to skip, 1 in the paper.", GUIDANCE),
    ] = None
    guide_scale: Annotated[
        float | None,
        Range(),
        Doc("Autoguidance by --guide-model, 1.5 by default; 1 for no effect.", GUIDANCE),
        Varies.CALL,
        NoOp(1.0),
    ] = None
    clip_scale: Annotated[
        float | None,
        Range(0, LARGEST_FLOAT),
        Doc("CLIP guidance by --clip-model; 0 for no effect.", GUIDANCE),
        Varies.CALL,
        NoOp(0.0),
    ] = None
    clip_interval: Annotated[
        tuple[float, float] | None,
        Interval(),
        Doc("Times at which CLIP guidance acts; 0-1 by default.", GUIDANCE),
        Requires("clip_scale", (0.0, 1.0)),
    ] = None
    clip_cutouts: Annotated[
        int | None,
        Range(0, 256),
        Doc("Random square crops that CLIP sees instead of the whole image.", GUIDANCE),
        Requires("clip_scale", 0),
    ] = None
    init_image: Annotated[
        epath.Path | None,
        File(),
        Doc("Image to start from.", EDITING, common=True),
        Varies.IMAGE,
    ] = None
    reference: Annotated[
        tuple[epath.Path, ...] | None,
        Files(),
        Doc(
            "Images that the prompt edits or combines. For models such as FLUX.2; the result has "
            "the size of the first one by default.",
            EDITING,
            common=True,
        ),
        Varies.IMAGE,
    ] = None
    strength: Annotated[
        float | None,
        Range(0, 1),
        Doc(
            "How much --init-image may change, 0 to 1. It is the noise added: 0.6 by default, 1 "
            "with --mask.",
            EDITING,
            common=True,
        ),
        Varies.BATCH,
        Requires("init_image"),
    ] = None
    mask: Annotated[
        epath.Path | None,
        File(),
        Doc(
            "Image that is white (or opaque) where to inpaint.",
            EDITING,
            common=True,
        ),
        Varies.IMAGE,
        Requires("init_image"),
    ] = None
    variation: Annotated[
        float | None,
        Range(0, 1),
        Doc(
            "Vary --init-image: find its noise by DDIM inversion, and rotate that so far toward "
            "the noise of the seed; unguided by default.",
            EDITING,
        ),
        Varies.IMAGE,
        Requires("init_image"),
    ] = None
    mix_prompt: Annotated[
        str | None, Text(), Doc("Second prompt, to mix into the first one.", EDITING), Varies.IMAGE
    ] = None
    mix_seed: Annotated[
        int | None,
        Range(0, LARGEST_SEED),
        Doc("Seed of the second prompt's noise; that of the image by default.", EDITING),
        Varies.IMAGE,
        Requires("mix_prompt"),
    ] = None
    mix: Annotated[
        float | None,
        Range(0, 1),
        Doc("Fraction of the second prompt and its noise; 0.5 by default.", EDITING),
        Varies.IMAGE,
        Requires("mix_prompt", 0.5),
    ] = None
    upscale: Annotated[
        int | None,
        Range(1, 16),
        Doc("Enlarge the image by this factor, and sample its details in windows.", EDITING),
        NoOp(1),
    ] = None
    upscale_strength: Annotated[
        float | None,
        Range(0, 1),
        Doc("How much of the enlarged image may change; 0.35 by default.", EDITING),
        Varies.BATCH,
        Requires("upscale", 0.35),
    ] = None

    @classmethod
    def read(
        cls, values: Mapping[str, Any], called: Callable[[str], str] = str
    ) -> "GenerationSettings":
        """Return the settings that JSON states.

        Args:
          values: by the names of fields; None sets nothing.
          called: maps a field to its name in messages.

        Raises:
          UserError: there is no such field, or no such value.
        """
        return cls(**check_fields(cls, values, called))

    def given(self) -> dict[str, Any]:
        """Return the fields that are set."""
        pairs = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {f.name: value for f, value in pairs if value != f.default}

    def inherit(self, other: "GenerationSettings") -> "GenerationSettings":
        """Return these settings, with another's in the place of those that are not set."""
        unset = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is None]
        return dataclasses.replace(self, **{name: getattr(other, name, None) for name in unset})

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set as JSON: the inverse of `read`."""
        fields = fields_of(type(self))
        return {name: fields[name].to_json(value) for name, value in self.given().items()}

    def group(self, level: Varies) -> tuple[Any, ...]:
        """Return a key that is equal for images of one program, call or batch.

        Args:
          level: PROGRAM, CALL or BATCH.
        """
        parts = []
        for f in fields_of(type(self)).values():
            varies, value = f.mark(Varies) or Varies.PROGRAM, getattr(self, f.name)
            if varies <= level:
                parts.append(value)
            elif varies != Varies.FREE:
                parts.append(value is None)
        return tuple(parts)


CONFLICTS: dict[str, tuple[tuple[str, ...], str]] = {
    "variation": (
        ("mask", "strength", "solver", "mix_prompt", "clip_scale", "resample_steps", "guide_scale"),
        "a variation inverts and samples by DDIM without these",
    ),
    "cache_interval": (
        ("cache_threshold", "resample_steps", "upscale"),
        "a cache has one rule, and follows an image as a whole from step to step",
    ),
    "cache_threshold": (
        ("resample_steps", "upscale"),
        "a cache follows an image as a whole from step to step",
    ),
    "upscale": (("mask",), "upscaling changes the pixels that a mask keeps"),
    "refiner_start": (
        ("init_image", "reference", "upscale"),
        "a refiner continues from the noise of this image",
    ),
    "reference": (("init_image", "upscale"), "an image starts from noise, or from another image"),
}
"""Fields, with the others that they exclude, and the reason."""


def without_no_ops(
    settings: GenerationSettings, except_for: tuple[str, ...] = ()
) -> GenerationSettings:
    """Return settings without values that have no effect.

    Args:
      settings: of an image.
      except_for: fields whose values override the model's.
    """
    marks = {name: f.mark(NoOp) for name, f in fields_of(type(settings)).items()}
    changes = {
        name: None
        for name, mark in marks.items()
        if mark and name not in except_for and getattr(settings, name) == mark.value
    }
    return dataclasses.replace(settings, **changes)


def with_requirements(
    settings: GenerationSettings, own: GenerationSettings, called: Callable[[str], str] = str
) -> GenerationSettings:
    """Apply `Requires`: set defaults, and drop inherited fields without the one they require.

    Args:
      settings: of an image, with inherited values.
      own: the values set for this image.
      called: maps a field to its name in messages.

    Raises:
      UserError: `own` sets a field without the one that it requires.
    """
    changes = {}
    for name, f in fields_of(type(settings)).items():
        rule = f.mark(Requires)
        if rule is None:
            continue
        if getattr(settings, rule.name) is not None:
            value = getattr(settings, name)
            changes[name] = rule.default if value is None else value
        elif getattr(own, name) is not None:
            raise UserError(
                f"{called(name)} has no effect without {called(rule.name)}: give "
                f"{called(rule.name)} as well."
            )
        else:
            changes[name] = None  # inherited, for images that set the required field
    return dataclasses.replace(settings, **changes)


def check_conflicts(settings: GenerationSettings, called: Callable[[str], str] = str) -> None:
    """Raise `UserError` for two fields that exclude each other."""
    for name, (others, why) in CONFLICTS.items():
        wrong = [called(other) for other in others if getattr(settings, other) is not None]
        if getattr(settings, name) is not None and wrong:
            raise UserError(f"{called(name)} and {wrong[0]} exclude each other: {why}.")
    if settings.seamless and settings.vae_mode == "tiling":
        raise UserError(
            f"{called('seamless')} and {called('vae_mode')} tiling exclude each other: tiles do "
            "not wrap; expected slicing."
        )
