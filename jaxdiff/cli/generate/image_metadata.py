"""How the file of an image tells what it is made of, and how that is read back.

A file that `sample.py` writes has these texts (`image_files.py` says where):

    prompt, seed, model, model_fingerprint
    settings     JSON: how it was drawn, as a user sets it
    details      JSON: what else decides the pixels, and where they were made
    parameters   the same for people and for the tools that read the files of web UIs
"""

import dataclasses
import functools
import json
import re
import typing
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxdiff.cli.generate.image_files import read_text
from jaxdiff.cli.generate.prompt_file import PATHS, Row, checked, flag
from jaxdiff.cli.generate.settings import Fixed, ImageSettings, open_input, settle
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.tiling import VaeMode
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.load import read_bundle, weights_fingerprint
from jaxdiff.sampling.guidance.cfg import Guidance
from jaxdiff.sampling.sampler import SOLVERS
from jaxdiff.training.recipe import from_json, to_json
from jaxdiff.training.step import ComputeType

# What web UIs call a solver, where it is not the name of its class.
SAMPLERS = {
    "DPMSolverPP2M": "DPM++ 2M",
    "DPMSolverPP2MSDE": "DPM++ 2M SDE",
    "DPMSolverPPSDE": "DPM++ SDE",
    "EulerAncestral": "Euler a",
}

_EVERYWHERE = {"type", "solver", "num_steps", "guidance_scale", "prompts"}  # or of no effect here


def as_set(settings: ImageSettings, pipeline: Pipeline) -> dict[str, Any]:
    """The settings as a user sets them, for JSON; not the prompt and the seed.

    Of what does nothing, and of guidance that is the recipe's, it says nothing.
    """
    width, height = settings.size
    shown: dict[str, Any] = {
        "negative_prompt": settings.negative_prompt,
        "num_steps": settings.num_steps,
        "guidance_scale": settings.guidance_scale,
        "size": f"{width}x{height}",
        "solver": type(settings.solver).__name__,
    }
    for name in PATHS:
        file = getattr(settings, name)
        if file is not None:
            shown[name] = {"file": file.path.name, "sha256": file.sha256}
    if settings.strength is not None:
        shown["strength"] = settings.strength
    if settings.clip is not None:
        shown["clip_scale"] = settings.clip.scale
        shown["clip_interval"] = _range(settings.clip.interval)
        shown["clip_cutouts"] = settings.clip.cutouts
    if settings.repeats > 1:
        shown["repeats"] = settings.repeats
    if settings.mixed is not None:
        shown["toward"] = settings.mixed.toward
        shown["toward_seed"] = settings.mixed.seed
        shown["share"] = settings.mixed.share
    if settings.weak is not None:
        shown["weak_scale"] = settings.weak.scale
    if settings.variation is not None:
        shown["variation"] = settings.variation
    if settings.enlarged is not None:
        shown["upscale"] = settings.enlarged.factor
        shown["upscale_strength"] = settings.enlarged.strength
    if settings.choice is not None:
        shown["best_of"] = settings.choice.of
    recipe = _guidance(pipeline.config.sampling.guidance)
    acts = _guidance(settings.guidance)
    return shown | {name: value for name, value in acts.items() if value != recipe[name]}


def _guidance(guidance: Guidance) -> dict[str, Any]:
    apg, zero_star = guidance.apg, guidance.zero_star
    return {
        "guidance_interval": _range(guidance.interval),
        "guidance_rescale": guidance.rescale,
        "apg": apg and apg.eta,
        "zero_star": zero_star and zero_star.zero_steps,
    }


def _range(interval: tuple[float, float]) -> str:
    """LOW-HIGH, without the exponents in which a small number is shown otherwise."""
    return "-".join(np.format_float_positional(end, trim="-") for end in interval)


@functools.lru_cache(maxsize=4)
def fingerprint_of(model: str) -> str:
    """SHA-256 of the weights of a model beside the one that draws, in hex.

    Raises:
      UserError: there is no such model.
    """
    bundle = read_bundle(model)
    return weights_fingerprint({"params": bundle.params, "frozen": bundle.frozen})


def details(settings: ImageSettings, pipeline: Pipeline) -> dict[str, Any]:
    """What else decides the pixels, for JSON: of the recipe, the solver and the arithmetic."""
    recipe = to_json(pipeline.config.sampling)
    clip = settings.clip.model if settings.clip else settings.choice and settings.choice.clip
    beside = {"clip": clip, "weak": settings.weak and settings.weak.model}
    return {
        "solver": to_json(settings.solver),
        "decode_by": settings.decode_by,
        "dtype": pipeline.dtype,
        "recipe": {name: value for name, value in recipe.items() if name not in _EVERYWHERE},
        **{name: fingerprint_of(model) for name, model in beside.items() if model},
    }


def file_text(settings: ImageSettings, pipeline: Pipeline) -> dict[str, str]:
    """What an image's file tells of it, by name."""
    made = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    return {
        "prompt": settings.prompt,
        "seed": str(settings.seed),
        "settings": json.dumps(as_set(settings, pipeline)),
        "model": pipeline.config.name,
        "model_fingerprint": pipeline.fingerprint,
        "details": json.dumps(details(settings, pipeline) | made),
        "parameters": parameters(settings, pipeline.config.name, pipeline.fingerprint),
    }


def parameters(settings: ImageSettings, model: str, fingerprint: str) -> str:
    """The text that web UIs put into their files under this name, and read from there."""
    solver = type(settings.solver).__name__
    pairs = {
        "Steps": str(settings.num_steps),
        "Sampler": SAMPLERS.get(solver, solver),
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": str(settings.seed),
        "Size": "{}x{}".format(*settings.drawn_size),
        "Model": model,
        "Model hash": fingerprint[:10],
    }
    if settings.strength is not None:
        pairs["Denoising strength"] = f"{settings.strength:g}"
    if settings.clip is not None:
        pairs["CLIP guidance"] = f"{settings.clip.scale:g}"
    shown = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items())
    return f"{settings.prompt}\nNegative prompt: {settings.negative_prompt}\n{shown}"


def _quoted(value: str) -> str:
    """A value as it is, or in quotes where it has in it what parts the pairs."""
    return json.dumps(value) if re.search("[,:\n]", value) else value


class Told(NamedTuple):
    """What the text of a file says of how its image was made."""

    text: dict[str, str]
    settings: dict[str, Any]
    details: dict[str, Any]

    @property
    def seamless(self) -> bool:
        """Whether the image goes on at its other side, down and across."""
        return self.details["recipe"].get("seamless") == [True, True]


def read_told(path: epath.PathLike) -> Told:
    """What `file_text` wrote into a file.

    Raises:
      UserError: there is no such file, it is none of pixels as they were, or it has no such text.
    """
    text = read_text(path)
    needed = ("prompt", "seed", "settings", "details", "model", "model_fingerprint")
    missing = [name for name in needed if name not in text]
    if missing:
        raise UserError(
            f"{path} does not say how it was made (it has no text {', '.join(missing)}): expected "
            "a file as sample.py wrote it, whose text no other program has removed."
        )
    try:
        told = Told(text, json.loads(text["settings"]), json.loads(text["details"]))
    except ValueError as error:
        raise _changed(path) from error
    if not isinstance(told.settings, dict) or not isinstance(told.details, dict):
        raise _changed(path)
    if not isinstance(told.details.get("recipe"), dict):
        raise _changed(path)
    types = (None, *typing.get_args(ComputeType))
    if told.details.get("dtype") not in types:
        raise _changed(path)
    return told


def _changed(path: epath.PathLike) -> UserError:
    return UserError(f"The text in {path} is not as sample.py wrote it: take the original file.")


def settings_told(
    path: epath.PathLike, told: Told, pipeline: Pipeline, given: Row, fixed: Fixed
) -> ImageSettings:
    """The settings of an image that is to be drawn again.

    Args:
      path: of its file, for messages.
      told: what that says.
      pipeline: the model to draw with.
      given: `init_image` and `mask`, which a file has no room for.
      fixed: the CLIP and the weaker model, if they steered.

    Raises:
      UserError: a model or an input is another one, or the text was changed.
    """
    if told.text["model_fingerprint"] != pipeline.fingerprint:
        raise UserError(
            f"{path} was made by the model {told.text['model']} with the fingerprint "
            f"{told.text['model_fingerprint'][:10]}, not by {pipeline.config.name} with "
            f"{pipeline.fingerprint[:10]}: give the one that made it with --model, with the same "
            "--lora, --embedding and --dtype."
        )
    for name in PATHS:
        _check_input(path, name, told.settings.get(name), getattr(given, name))
    try:
        own = type(pipeline.config.sampling.solver)
        solvers = tuple({own} | {type(make()) for make in SOLVERS.values()})
        solver = from_json(typing.Union[solvers], told.details["solver"], "solver")  # noqa: UP007
        decode_by = _one_of(typing.get_args(VaeMode), told.details["decode_by"])
        named = {name: v for name, v in told.settings.items() if name not in ("solver", *PATHS)}
        seed = int(told.text["seed"])
        row = dataclasses.replace(given, prompt=told.text["prompt"], seed=seed, **checked(named))
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise _changed(path) from error
    settings = settle(
        row, Row(prompt=""), pipeline, dataclasses.replace(fixed, decode_by=decode_by)
    )
    settings = dataclasses.replace(settings, solver=solver)
    found = details(settings, pipeline)
    if found["recipe"] != told.details["recipe"]:
        raise UserError(
            f"{path} was made by a recipe that samples otherwise than {pipeline.config.name} does "
            "now: restore the key sampling of the config.json of the model."
        )
    for name, what in (("clip", "CLIP"), ("weak", "weaker model")):
        if found.get(name) != told.details.get(name):
            raise UserError(f"{path} was steered by another {what}: give that as --{name}-model.")
    if json.loads(json.dumps(as_set(settings, pipeline))) != told.settings:
        raise _changed(path)
    return settings


def _check_input(path: epath.PathLike, name: str, then: Any, now: epath.Path | None) -> None:
    """Raises `UserError` unless an input is the one that a file was made from, or neither is."""
    digest = now and open_input(now).sha256
    try:
        if digest == (None if then is None else then["sha256"]):
            return
        if then is None:
            raise UserError(f"{path} was made without {flag(name)}: leave that out.")
        raise UserError(
            f"{path} was made from {then['file']}: give that file, as it was then, as {flag(name)}."
        )
    except (KeyError, TypeError) as error:
        raise _changed(path) from error


def _one_of(known: tuple[Any, ...], value: Any) -> Any:
    return known[known.index(value)]  # ValueError for what is none of them
