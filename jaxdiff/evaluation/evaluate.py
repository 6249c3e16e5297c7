"""Scores of a trained text-to-image model, by the rules of the data set that it was trained on."""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.data.sources.cached_latents import CachedLatents
from jaxdiff.datasets.openmoji import score as openmoji_score
from jaxdiff.datasets.openmoji.source import OpenMoji
from jaxdiff.datasets.produce import score as produce_score
from jaxdiff.datasets.produce.source import Produce, full_caption
from jaxdiff.distributed.multihost import is_lead
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.load import read_bundle
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.training.recipe import Config

Figures = dict[str, dict[str, dict[str, float]]]
"""{what was drawn: {attribute: {"score", "ceiling", "chance"}}}, fractions in [0, 1].

Of a model that works on latents there is also "latents": what the true drawings, whose score is
the ceiling, score after the way through its autoencoder.
"""

Draw = Callable[[Sequence[str]], np.ndarray]


def evaluate(
    pipeline: Pipeline,
    *,
    samples: int = 500,
    best_of: int = 1,
    clip_model: str = ClipGuidance.model,
    **settings: Any,
) -> Figures:
    """Draws prompts that rules can judge, and judges the images.

    Args:
      pipeline: a model trained on `Produce` or on `OpenMoji`.
      samples: prompts of each kind; image i has seed i.
      best_of: how many images are drawn for each, their seeds counting up from i times as many, of
        which the one is judged that a CLIP chooses.
      clip_model: which one, as `ClipGuidance` names it.
      settings: what else `pipeline(prompts)` takes, such as guidance_scale.

    Raises:
      UserError: as `check_scorable`, or what the pipeline raises.
    """
    check_scorable(pipeline.config)
    source = _drawn(pipeline.config)

    def draw(prompts: Sequence[str]) -> np.ndarray:
        if best_of == 1:
            return pipeline(prompts, **settings)
        return pipeline.best(prompts, of=best_of, clip=clip_model, **settings).images

    if isinstance(source, Produce):
        autoencode = pipeline.autoencode if pipeline.task.latents else None
        return _produce(draw, autoencode, samples)
    assert isinstance(source, OpenMoji)  # as was checked
    return _openmoji(draw, samples, source)


def check_scorable(config: Config) -> None:
    """Tells before training whether `evaluate` can score what a recipe trains.

    Raises:
      UserError: no rule judges images of the recipe's data set, or none of their size.
    """
    source, size = _drawn(config), config.data.transforms.size
    otherwise = "score another model, or train with eval_samples 0, which leaves the scoring out."
    if not isinstance(source, Produce | OpenMoji):
        raise UserError(
            f"There is no score for models trained on {type(source).__name__}: expected Produce or "
            f"OpenMoji, whose images rules can check against their prompts; {otherwise}"
        )
    known = produce_score.SIZE if isinstance(source, Produce) else source.size
    if size != known:
        raise UserError(
            f"There is no score for images of {size} pixels: expected data.transforms.size to be "
            f"{known}, that of the drawings which {type(source).__name__} is scored by; "
            f"{otherwise}"
        )


def _drawn(config: Config) -> Any:
    """The data set that a recipe trains on, or whose latents it does."""
    source = config.data.source
    return source.of if isinstance(source, CachedLatents) else source


def _produce(
    draw: Draw, autoencode: Callable[[np.ndarray], np.ndarray] | None, samples: int
) -> Figures:
    """Single objects in combinations held out of training, the same in trained ones, and pairs."""
    scenes_of = functools.partial(produce_score.evaluation_scenes, samples)
    sets = {
        "single objects, held-out combinations": scenes_of("held_out", "single"),
        "single objects, trained combinations": scenes_of("train", "single"),
        "two objects": scenes_of("train", "two"),
    }
    figures = {}
    for name, scenes in sets.items():
        images = draw([full_caption(scene) for scene in scenes])
        true = produce_score.render_scenes(scenes)
        columns = {
            "score": produce_score.score_scenes(images, scenes),
            "ceiling": produce_score.score_scenes(true, scenes),
            "chance": produce_score.chance(images, scenes),
        }
        if autoencode:
            columns["latents"] = produce_score.score_scenes(autoencode(true), scenes)
        figures[name] = _by_attribute(**columns)
    return figures


def _openmoji(draw: Draw, samples: int, source: OpenMoji) -> Figures:
    """People at work in held-out combinations of profession, gender and skin tone."""
    prompts = openmoji_score.held_out_prompts(samples)
    images = draw([prompt.text for prompt in prompts])
    drawings = OpenMoji(split="all", size=source.size, cache=source.cache)
    result = openmoji_score.score_workers(images, [prompt.target for prompt in prompts], drawings)
    return {"people at work, held-out combinations": _by_attribute(**result._asdict())}


def _by_attribute(**columns: dict[str, float]) -> dict[str, dict[str, float]]:
    """From {column: {attribute: figure}} to {attribute: {column: figure}}."""
    attributes = columns["score"]
    return {a: {name: column[a] for name, column in columns.items()} for a in attributes}


def table(figures: Figures) -> str:
    """Plain text: a line for each attribute, in percent; its last, "joint", is all of them."""
    lines = []
    for name, attributes in figures.items():
        columns = next(iter(attributes.values()))
        lines.append(f"{name:<40}" + "".join(f"{column:>9}" for column in columns))
        for attribute, row in attributes.items():
            text = "".join(f"{figure:>9.1%}" for figure in row.values())
            lines.append(f"  {attribute:<38}{text}")
    return "\n".join(lines)


def evaluate_folder(
    folder: str,
    *,
    samples: int,
    batch_size: int | None = None,
    guidance_scale: float | None = None,
    best_of: int = 1,
    clip_scale: float = 0.0,
    clip_model: str = ClipGuidance.model,
) -> None:
    """`jaxdiff evaluate`: prints the table, and saves the figures in the model's folder.

    Those of a model that comes with jaxdiff (`shipped:NAME`) are only printed.

    Raises:
      UserError: as `evaluate` and `ClipGuidance`; fewer than two samples, less than one to choose
        from, a choice among what is steered, or a CLIP for neither; or the folder holds no
        text-to-image model.
    """
    if samples < 2:
        raise UserError(f"--samples is {samples}: expected at least 2, and 500 for firm figures.")
    if best_of < 1:
        raise UserError(f"--best-of is {best_of}: expected how many to choose from, 1 or more.")
    if clip_scale and best_of > 1:
        raise UserError("--clip-scale and --best-of exclude each other: leave one of them out.")
    with_clip = clip_scale != 0 or best_of > 1
    if clip_model != ClipGuidance.model and not with_clip:
        raise UserError("--clip-model is about --clip-scale and --best-of: give one of these, too.")
    pipeline = Pipeline(read_bundle(folder))
    scale = pipeline.config.sampling.guidance_scale if guidance_scale is None else guidance_scale
    how = {"samples": samples, "guidance_scale": scale, "best_of": best_of}
    settings: dict[str, Any] = how | {"batch_size": batch_size}
    if clip_scale:
        settings["clip"] = ClipGuidance(scale=clip_scale, model=clip_model)
    if best_of > 1:
        settings["clip_model"] = clip_model
    figures = evaluate(pipeline, **settings)
    if with_clip:
        how |= {"clip_scale": clip_scale, "clip_model": clip_model}
    if not is_lead():
        return
    print(table(figures))
    chosen = f", each the best of {best_of} as {clip_model} finds" if best_of > 1 else ""
    steered = f", steered by {clip_model} at scale {clip_scale:g}" if clip_scale else ""
    print(f"{samples} samples of each kind, guidance scale {scale:g}{steered}{chosen}")
    if not folder.startswith("shipped:"):
        path = epath.Path(folder) / "evaluation.json"
        text = json.dumps({**how, "figures": figures}, indent=2) + "\n"
        write_whole(path, text.encode())
        print(f"Saved {path}")
