"""Draws images of settings of one kind by one call of a pipeline."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.cli.generate.settings import ImageSettings, InputFile
from jaxdiff.errors import UserError
from jaxdiff.io import images as pictures
from jaxdiff.pipelines.auxiliary_models import choose
from jaxdiff.pipelines.batching import Preview
from jaxdiff.pipelines.pipeline import Pipeline


class Drawn(NamedTuple):
    """Images, and what each was drawn by, with the seed that was chosen."""

    images: np.ndarray  # uint8 [n, h, w, 3]
    settings: list[ImageSettings]


def draw_together(
    pipeline: Pipeline, settings: Sequence[ImageSettings], *, preview: Preview | None = None
) -> Drawn:
    """Draws settings of one `call_group`, chooses and enlarges.

    Raises:
      UserError: they do not fit the model, or an image is gone or was changed.
    """
    choice, enlarge = settings[0].choice, settings[0].enlarged
    tried = [s for one in settings for s in _tried(one)]
    images = _drawn(pipeline, tried, {"preview": preview})
    if choice:
        best = choose(choice.clip, images, [s.prompt for s in tried], choice.of).rows
        images, tried = images[best], [tried[i] for i in best]
    if enlarge:
        more: dict[str, Any] = _common(tried) | {"preview": preview}
        if more["decode_by"] == "whole":
            del more["decode_by"]  # which is by tiles where they are smaller
        more["strength"] = [s.enlarged.strength for s in tried if s.enlarged]
        prompts = [s.prompt for s in tried]
        images = pipeline.upscaled(images, prompts, factor=enlarge.factor, **more)
    return Drawn(images, tried)


def snapshots(pipeline: Pipeline, settings: Sequence[ImageSettings], count: int) -> np.ndarray:
    """Estimates of the images on the way, uint8 [count, n, h, w, 3], before any are enlarged."""
    return _drawn(pipeline, settings, {"num_snapshots": count})


def _tried(settings: ImageSettings) -> list[ImageSettings]:
    if settings.choice is None:
        return [settings]
    alone = dataclasses.replace(settings, choice=None)
    return alone.copies(settings.choice.of)


def _common(settings: Sequence[ImageSettings]) -> dict[str, Any]:
    """What a pipeline is told of settings, whatever it draws from."""
    first, mixtures = settings[0], [s.mixed for s in settings if s.mixed]
    mixed = {"toward": [m.toward for m in mixtures], "share": [m.share for m in mixtures]}
    return {
        "negative_prompt": [s.negative_prompt for s in settings],
        "seeds": [s.seed for s in settings],
        "num_steps": [s.num_steps for s in settings],
        "guidance_scale": [s.guidance_scale for s in settings],
        "solver": first.solver,
        "decode_by": first.decode_by,
        "clip": first.clip,
        "guidance": first.guidance,
        "weak": first.weak,
        "repeats": first.repeats,
        **(mixed if mixtures else {}),
    }


def _drawn(
    pipeline: Pipeline, settings: Sequence[ImageSettings], more: dict[str, Any]
) -> np.ndarray:
    first, told = settings[0], _common(settings) | more
    prompts = [s.prompt for s in settings]
    if first.init_image is not None:
        told["image"] = np.stack([_pixels(s.init_image) for s in settings])
    if first.variation is not None:
        del told["solver"]  # its own
        return pipeline.variations(
            amount=[s.variation or 0.0 for s in settings], prompt=prompts, **told
        )
    if first.init_image is not None:
        told["strength"] = [s.strength for s in settings]
    if first.mask is not None:
        told["mask"] = np.stack([_pixels(s.mask).mean(-1) / 255 for s in settings])
    if first.mixed is not None:
        told["latents"] = pipeline.noise(
            told["seeds"],
            toward=[s.mixed.seed for s in settings if s.mixed],
            amount=told["share"],
            size=first.size,
        )
    return pipeline(prompts, size=first.size, **told)


def _pixels(file: InputFile | None) -> pictures.Picture:
    assert file is not None  # those drawn together all have one
    picture = pictures.read_picture(file.path)
    if picture.shape[1::-1] != file.size:
        raise UserError(f"{file.path} was changed since the start: start again.")
    return picture
