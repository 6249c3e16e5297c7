"""All that an image is made of beside the model, and how a PNG file tells it.

A file that `sample.py` writes has these text chunks:

    prompt, seed, model, model_fingerprint
    settings     JSON: how it was drawn, as a user sets it
    details      JSON: what else decides the pixels, and where they were made
    parameters   the same for people and for the tools that read the files of web UIs
"""

import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxdiff import pictures
from jaxdiff.config import from_json, to_json
from jaxdiff.errors import UserError
from jaxdiff.models.tiling import Pieces
from jaxdiff.pipeline import IMAGE_STRENGTH, Pipeline
from jaxdiff.prompt_file import Row
from jaxdiff.sampling.settings import SOLVERS
from jaxdiff.sampling.solvers import Solver
from jaxdiff.training.step import ComputeType

# What web UIs call a solver, where it is not the name of its class.
SAMPLERS = {
    "DPMSolverPP2M": "DPM++ 2M",
    "DPMSolverPP2MSDE": "DPM++ 2M SDE",
    "DPMSolverPPSDE": "DPM++ SDE",
    "EulerAncestral": "Euler a",
}

_EVERYWHERE = {"type", "solver", "num_steps", "guidance_scale", "prompts"}  # or of no effect here


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
class ImageSettings:
    """What one image is drawn by."""

    prompt: str
    negative_prompt: str
    seed: int
    num_steps: int
    guidance_scale: float
    solver: Solver
    size: tuple[int, int]
    decode_by: Pieces = "whole"
    image: InputFile | None = None
    mask: InputFile | None = None
    strength: float | None = None

    @property
    def shape_group(self) -> tuple[Any, ...]:
        """Settings that differ in this compile a loop each."""
        return self.solver, self.size, self.decode_by, self.image is None, self.mask is None

    @property
    def batch_group(self) -> tuple[Any, ...]:
        """Settings that differ in this are not drawn by one call; those of a loop may be."""
        return *self.shape_group, self.num_steps, self.strength


def settle(
    row: Row,
    defaults: Row,
    pipeline: Pipeline,
    decode_by: Pieces = "whole",
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
    image, mask, strength = chosen("image"), chosen("mask"), chosen("strength")
    if image is None:
        if row.mask is not None or row.strength is not None:
            raise UserError("mask and strength are about an image: give image as well.")
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
    return ImageSettings(
        prompt=row.prompt,
        negative_prompt=chosen("negative_prompt", ""),
        seed=chosen("seed", 0),
        num_steps=chosen("num_steps", recipe.num_steps),
        guidance_scale=float(chosen("guidance_scale", recipe.guidance_scale)),
        solver=SOLVERS[name]() if name else recipe.solver,
        size=size,
        decode_by=decode_by,
        image=image,
        mask=mask,
        strength=strength,
    )


def draw_together(
    pipeline: Pipeline, settings: Sequence[ImageSettings], num_snapshots: int = 0
) -> np.ndarray:
    """Images uint8 [n, h, w, 3] of settings of one `batch_group`; with snapshots [k, n, h, w, 3].

    Raises:
      UserError: they do not fit the model, or an image is gone or was changed.
    """
    first = settings[0]
    inputs: dict[str, Any] = {}
    if first.image is not None:
        inputs["image"] = np.stack([_pixels(s.image) for s in settings])
        if first.strength is not None:
            inputs["strength"] = first.strength
    if first.mask is not None:
        inputs["mask"] = np.stack([_pixels(s.mask).mean(-1) / 255 for s in settings])
    return pipeline(
        [s.prompt for s in settings],
        negative_prompt=[s.negative_prompt for s in settings],
        seeds=[s.seed for s in settings],
        num_steps=first.num_steps,
        guidance_scale=[s.guidance_scale for s in settings],
        solver=first.solver,
        size=first.size,
        num_snapshots=num_snapshots,
        decode_by=first.decode_by,
        **inputs,
    )


def _pixels(file: InputFile | None) -> pictures.Picture:
    assert file is not None  # those drawn together all have one
    picture = pictures.read_picture(file.path)
    if picture.shape[1::-1] != file.size:
        raise UserError(f"{file.path} was changed since the start: start again.")
    return picture


def as_set(settings: ImageSettings) -> dict[str, Any]:
    """The settings as a user sets them, for JSON; not the prompt and the seed."""
    width, height = settings.size
    shown: dict[str, Any] = {
        "negative_prompt": settings.negative_prompt,
        "num_steps": settings.num_steps,
        "guidance_scale": settings.guidance_scale,
        "solver": type(settings.solver).__name__,
        "size": f"{width}x{height}",
    }
    for name in ("image", "mask"):
        file = getattr(settings, name)
        if file is not None:
            shown[name] = {"file": file.path.name, "sha256": file.sha256}
    if settings.strength is not None:
        shown["strength"] = settings.strength
    return shown


def details(settings: ImageSettings, pipeline: Pipeline) -> dict[str, Any]:
    """What else decides the pixels, for JSON: of the recipe, the solver and the arithmetic."""
    recipe = to_json(pipeline.config.sampling)
    return {
        "solver": to_json(settings.solver),
        "decode_by": settings.decode_by,
        "dtype": pipeline.dtype,
        "recipe": {name: value for name, value in recipe.items() if name not in _EVERYWHERE},
    }


def png_text(settings: ImageSettings, pipeline: Pipeline) -> dict[str, str]:
    """The text chunks of an image's file."""
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
    shown = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items())
    return f"{settings.prompt}\nNegative prompt: {settings.negative_prompt}\n{shown}"


def _quoted(value: str) -> str:
    """A value as it is, or in quotes where it has in it what parts the pairs."""
    return json.dumps(value) if re.search("[,:\n]", value) else value


class Told(NamedTuple):
    """What the text of a PNG file says of how its image was made."""

    text: dict[str, str]
    settings: dict[str, Any]
    details: dict[str, Any]


def read_told(path: epath.PathLike) -> Told:
    """What `png_text` wrote into a file.

    Raises:
      UserError: there is no such file, it is no PNG file, or it has no such text.
    """
    text = pictures.read_text(path)
    needed = ("prompt", "seed", "settings", "details", "model", "model_fingerprint")
    missing = [name for name in needed if name not in text]
    if missing:
        raise UserError(
            f"{path} does not say how it was made (it has no text {', '.join(missing)}): expected "
            "a PNG file as sample.py wrote it, whose text no other program has removed."
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
    path: epath.PathLike, told: Told, pipeline: Pipeline, inputs: dict[str, InputFile | None]
) -> ImageSettings:
    """The settings of an image that is to be drawn again.

    Args:
      path: of its file, for messages.
      told: what that says.
      pipeline: the model to draw with.
      inputs: `image` and `mask`, which a file has no room for.

    Raises:
      UserError: the model or an input is another one, or the text was changed.
    """
    if told.text["model_fingerprint"] != pipeline.fingerprint:
        raise UserError(
            f"{path} was made by the model {told.text['model']} with the fingerprint "
            f"{told.text['model_fingerprint'][:10]}, not by {pipeline.config.name} with "
            f"{pipeline.fingerprint[:10]}: give the one that made it with --model, with the same "
            "--lora, --embedding and --dtype."
        )
    try:
        settings = _from_told(told, pipeline.config.sampling.solver, inputs)
        then = {name: _digest(told.settings.get(name)) for name in inputs}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _changed(path) from error
    if details(settings, pipeline)["recipe"] != told.details.get("recipe"):
        raise UserError(
            f"{path} was made by a recipe that samples otherwise than {pipeline.config.name} does "
            "now: restore the key sampling of the config.json of the model."
        )
    for name, file in inputs.items():
        if then[name] == (file and file.sha256):
            continue
        if then[name] is None:
            raise UserError(f"{path} was made without --{name}: leave that out.")
        raise UserError(
            f"{path} was made from the {name} {told.settings[name].get('file')}: give that file, "
            f"as it was then, as --{name}."
        )
    return settings


def _digest(told: dict[str, str] | None) -> str | None:
    """SHA-256 of an input, or None if there was none."""
    return None if told is None else told["sha256"]


def _from_told(told: Told, own: Solver, inputs: dict[str, InputFile | None]) -> ImageSettings:
    solvers = tuple({type(own)} | {type(make()) for make in SOLVERS.values()})
    width, height = told.settings["size"].split("x")
    strength = told.settings.get("strength")
    return ImageSettings(
        prompt=told.text["prompt"],
        negative_prompt=told.settings["negative_prompt"],
        seed=int(told.text["seed"]),
        num_steps=int(told.settings["num_steps"]),
        guidance_scale=float(told.settings["guidance_scale"]),
        solver=from_json(typing.Union[solvers], told.details["solver"], "solver"),  # noqa: UP007
        size=(int(width), int(height)),
        decode_by=_one_of(typing.get_args(Pieces), told.details["decode_by"]),
        strength=None if strength is None else float(strength),
        **inputs,
    )


def _one_of(known: tuple[Any, ...], value: Any) -> Any:
    return known[known.index(value)]  # ValueError for what is none of them
