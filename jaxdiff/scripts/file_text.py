"""How the file of an image tells what it is made of, and how that is read back.

A file that `sample.py` writes has these texts (`image_files.py` says where):

    prompt, seed, model, model_fingerprint
    settings     JSON: how it was drawn, as a user sets it
    details      JSON: what else decides the pixels, and where they were made
    parameters   the same for people and for the tools that read the files of web UIs
"""

import functools
import json
import re
import typing
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxdiff.bundle import read_bundle, weights_fingerprint
from jaxdiff.config import from_json, to_json
from jaxdiff.errors import UserError
from jaxdiff.models.tiling import Pieces
from jaxdiff.pipeline import Pipeline
from jaxdiff.sampling.clip_guidance import ClipGuidance
from jaxdiff.sampling.settings import SOLVERS
from jaxdiff.sampling.solvers import Solver
from jaxdiff.scripts.image_files import read_text
from jaxdiff.scripts.image_settings import ImageSettings, InputFile, Mixed
from jaxdiff.scripts.prompt_file import PATHS
from jaxdiff.training.step import ComputeType

# What web UIs call a solver, where it is not the name of its class.
SAMPLERS = {
    "DPMSolverPP2M": "DPM++ 2M",
    "DPMSolverPP2MSDE": "DPM++ 2M SDE",
    "DPMSolverPPSDE": "DPM++ SDE",
    "EulerAncestral": "Euler a",
}

_EVERYWHERE = {"type", "solver", "num_steps", "guidance_scale", "prompts"}  # or of no effect here


def as_set(settings: ImageSettings) -> dict[str, Any]:
    """The settings as a user sets them, for JSON; not the prompt and the seed."""
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
        shown["clip_interval"] = settings.clip.interval
        shown["clip_cutouts"] = settings.clip.cutouts
    if settings.repeats > 1:
        shown["repeats"] = settings.repeats
    if settings.mixed is not None:
        shown["toward"] = settings.mixed.toward
        shown["toward_seed"] = settings.mixed.seed
        shown["share"] = settings.mixed.share
    return shown


@functools.lru_cache(maxsize=4)
def clip_fingerprint(model: str) -> str:
    """SHA-256 of the weights of a CLIP, in hex.

    Raises:
      UserError: there is no such model.
    """
    bundle = read_bundle(model)
    return weights_fingerprint({"params": bundle.params, "frozen": bundle.frozen})


def details(settings: ImageSettings, pipeline: Pipeline) -> dict[str, Any]:
    """What else decides the pixels, for JSON: of the recipe, the solver and the arithmetic."""
    recipe = to_json(pipeline.config.sampling)
    clip = {} if settings.clip is None else {"clip": clip_fingerprint(settings.clip.model)}
    return {
        "solver": to_json(settings.solver),
        "decode_by": settings.decode_by,
        "dtype": pipeline.dtype,
        "recipe": {name: value for name, value in recipe.items() if name not in _EVERYWHERE},
        **clip,
    }


def file_text(settings: ImageSettings, pipeline: Pipeline) -> dict[str, str]:
    """What an image's file tells of it, by name."""
    made = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    return {
        "prompt": settings.prompt,
        "seed": str(settings.seed),
        "settings": json.dumps(as_set(settings)),
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
        "Size": f"{settings.size[0]}x{settings.size[1]}",
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
    types = (None, *typing.get_args(ComputeType))
    if told.details.get("dtype") not in types:
        raise _changed(path)
    return told


def _changed(path: epath.PathLike) -> UserError:
    return UserError(f"The text in {path} is not as sample.py wrote it: take the original file.")


def settings_told(
    path: epath.PathLike,
    told: Told,
    pipeline: Pipeline,
    inputs: dict[str, InputFile | None],
    clip_model: str = ClipGuidance.model,
) -> ImageSettings:
    """The settings of an image that is to be drawn again.

    Args:
      path: of its file, for messages.
      told: what that says.
      pipeline: the model to draw with.
      inputs: `init_image` and `mask`, which a file has no room for.
      clip_model: the CLIP, if one steered.

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
    try:
        settings = _from_told(told, pipeline.config.sampling.solver, inputs, clip_model)
        then = {name: _digest(told.settings.get(name)) for name in inputs}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _changed(path) from error
    if details(settings, pipeline)["recipe"] != told.details.get("recipe"):
        raise UserError(
            f"{path} was made by a recipe that samples otherwise than {pipeline.config.name} does "
            "now: restore the key sampling of the config.json of the model."
        )
    if details(settings, pipeline).get("clip") != told.details.get("clip"):
        raise UserError(f"{path} was steered by another CLIP: give that as --clip-model.")
    for name, file in inputs.items():
        if then[name] == (file and file.sha256):
            continue
        flag = f"--{name.replace('_', '-')}"
        if then[name] is None:
            raise UserError(f"{path} was made without {flag}: leave that out.")
        raise UserError(
            f"{path} was made from {told.settings[name].get('file')}: give that file, as it was "
            f"then, as {flag}."
        )
    return settings


def _digest(told: dict[str, str] | None) -> str | None:
    """SHA-256 of an input, or None if there was none."""
    return None if told is None else told["sha256"]


def _from_told(
    told: Told, own: Solver, inputs: dict[str, InputFile | None], clip_model: str
) -> ImageSettings:
    solvers = tuple({type(own)} | {type(make()) for make in SOLVERS.values()})
    settings = told.settings
    width, height = settings["size"].split("x")
    strength, clip, mixed = settings.get("strength"), None, None
    if "clip_scale" in settings:
        low, high = settings["clip_interval"]
        clip = ClipGuidance(
            model=clip_model,
            scale=float(settings["clip_scale"]),
            interval=(float(low), float(high)),
            cutouts=int(settings["clip_cutouts"]),
        )
    if "toward" in settings:
        seed, share = int(settings["toward_seed"]), float(settings["share"])
        mixed = Mixed(toward=settings["toward"], seed=seed, share=share)
    return ImageSettings(
        prompt=told.text["prompt"],
        negative_prompt=settings["negative_prompt"],
        seed=int(told.text["seed"]),
        num_steps=int(settings["num_steps"]),
        guidance_scale=float(settings["guidance_scale"]),
        size=(int(width), int(height)),
        solver=from_json(typing.Union[solvers], told.details["solver"], "solver"),  # noqa: UP007
        decode_by=_one_of(typing.get_args(Pieces), told.details["decode_by"]),
        strength=None if strength is None else float(strength),
        clip=clip,
        repeats=int(settings.get("repeats", 1)),
        mixed=mixed,
        **inputs,
    )


def _one_of(known: tuple[Any, ...], value: Any) -> Any:
    return known[known.index(value)]  # ValueError for what is none of them
