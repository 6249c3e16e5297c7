"""Generate the images of resolved settings with one call of a pipeline."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxdiff.pipelines import edit
from jaxdiff.pipelines.batching import Preview
from jaxdiff.pipelines.input_images import InitImage, References
from jaxdiff.pipelines.inputs import Mix, Prompt
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.refiner import load_refiner
from jaxdiff.pipelines.rerank import rank
from jaxdiff.pipelines.resolve import ResolvedSettings


class Generated(NamedTuple):
    """Images, and the settings of each, with the seed selected by `best_of`."""

    images: UInt8[np.ndarray, "n h w 3"]
    settings: list[ResolvedSettings]


def generate(
    pipe: Pipeline, settings: Sequence[ResolvedSettings], *, preview: Preview | None = None
) -> Generated:
    """Generate images, select the best of each, and upscale.

    Args:
      pipe: to sample with.
      settings: of the images, of one `group(Varies.CALL)`.
      preview: shows images in progress.

    Raises:
      UserError: settings that do not fit the model, or an input that is missing or changed.
    """
    first = settings[0]
    tried = [s for one in settings for s in _candidates(one)]
    images = _sample(pipe, tried, preview)
    if first.settings.best_of:
        prompts = [s.prompt for s in tried]
        best = rank(images, prompts, first.settings.best_of, first.clip_model).best
        images, tried = images[best], [tried[i] for i in best]
    if first.settings.upscale:
        images = edit.upscale(
            pipe,
            images,
            [_prompt(s) for s in tried],
            factor=first.settings.upscale,
            strength=[s.settings.upscale_strength or 0.0 for s in tried],
            **_arguments(tried, preview),
        )
    return Generated(images, tried)


def snapshots(
    pipe: Pipeline, settings: Sequence[ResolvedSettings], num: int
) -> UInt8[np.ndarray, "k n h w 3"]:
    """Return intermediate estimates of images, before upscaling; not of variations.

    Args:
      pipe: to sample with.
      settings: of the images, of one `group(Varies.CALL)`.
      num: k, estimates of each image.
    """
    prompts = [_prompt(s) for s in settings]
    return pipe.snapshots(prompts, num, **_call(pipe, settings, None))


def _candidates(settings: ResolvedSettings) -> list[ResolvedSettings]:
    count = settings.settings.best_of
    return [settings] if count is None else settings.replace(best_of=None).copies(count)


def _prompt(settings: ResolvedSettings) -> Prompt:
    asked = settings.settings
    if asked.mix_prompt is None or asked.mix is None:
        return asked.prompt
    return Mix(a=asked.prompt, b=asked.mix_prompt, fraction=asked.mix)


def _sample(
    pipe: Pipeline, settings: Sequence[ResolvedSettings], preview: Preview | None
) -> np.ndarray:
    prompts = [_prompt(s) for s in settings]
    if settings[0].settings.refiner_start is not None:
        return _refined(pipe, settings, prompts, preview)
    if settings[0].settings.variation is None:
        return pipe(prompts, **_call(pipe, settings, preview))
    return edit.variations(
        pipe,
        _stack(settings, "init_image"),
        [s.settings.variation or 0.0 for s in settings],
        prompts=prompts,
        **_arguments(settings, preview),
    )


def _refined(
    pipe: Pipeline,
    settings: Sequence[ResolvedSettings],
    prompts: Sequence[Prompt],
    preview: Preview | None,
) -> np.ndarray:
    """Sample the first part of the steps, and the others by the refiner, from noisy latents."""
    first, call = settings[0], _call(pipe, settings, preview)
    start = first.settings.refiner_start
    assert start is not None
    assert first.refiner_model is not None
    # Both visit the times of one grid, and pass on latents at one of them.
    own = first.sampler.inherit(pipe.spec.sampler).resolve()
    sampler = dataclasses.replace(first.sampler, solver=own.solver, grid=own.grid)
    parts = [
        dataclasses.replace(sampler, denoising_interval=part)
        for part in ((0.0, start), (start, 1.0))
    ]
    refiner = load_refiner(pipe, first.refiner_model)
    latents = pipe(prompts, **call | {"sampler": parts[0], "output": "latents"})
    return refiner(prompts, **call | {"sampler": parts[1], "latents": latents})


def _arguments(settings: Sequence[ResolvedSettings], preview: Preview | None) -> dict[str, Any]:
    """Return the arguments that a pipeline and its edits share."""
    return {
        "negative_prompt": [s.settings.negative_prompt for s in settings],
        "seeds": [s.seed for s in settings],
        "num_steps": [s.settings.num_steps for s in settings],
        "guidance_scale": [s.settings.guidance_scale for s in settings],
        "sampler": settings[0].sampler,
        "callback": preview,
    }


def _call(
    pipe: Pipeline, settings: Sequence[ResolvedSettings], preview: Preview | None
) -> dict[str, Any]:
    """Return the arguments of a pipeline, for images other than variations."""
    first = settings[0]
    arguments = _arguments(settings, preview) | {"size": first.size}
    if first.settings.init_image is not None:
        masks = None if first.settings.mask is None else _stack(settings, "mask")
        strengths = [s.settings.strength or 0.0 for s in settings]
        arguments["init"] = InitImage(
            image=_stack(settings, "init_image"), mask=masks, strength=strengths
        )
    if first.settings.reference is not None:
        count = len(first.files["reference"])
        images = [_stack(settings, "reference", i) for i in range(count)]
        arguments["init"] = References(images=images)
    if first.settings.mix_prompt is not None:
        arguments["latents"] = pipe.noise(
            arguments["seeds"],
            variation_seeds=[
                s.seed if s.settings.mix_seed is None else s.settings.mix_seed for s in settings
            ],
            variation_strength=[s.settings.mix or 0.0 for s in settings],
            size=first.size,
        )
    return arguments


def _stack(settings: Sequence[ResolvedSettings], name: str, which: int = 0) -> np.ndarray:
    return np.stack([s.files[name][which].read() for s in settings])
