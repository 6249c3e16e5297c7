"""Scores of a trained text-to-image model, by the rules of the data set that it was trained on."""

import functools
import json
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from jaxdiff.bundle import read_bundle, write_whole
from jaxdiff.data.openmoji import OpenMoji
from jaxdiff.data.produce import Produce, full_caption
from jaxdiff.errors import UserError
from jaxdiff.evaluation import openmoji_score, produce_score
from jaxdiff.pipeline import Pipeline

Figures = dict[str, dict[str, dict[str, float]]]
"""{what was drawn: {attribute: {"score", "ceiling", "chance"}}}, fractions in [0, 1]."""

Draw = Callable[[Sequence[str]], np.ndarray]


def evaluate(pipeline: Pipeline, *, samples: int = 500, batch_size: int | None = None) -> Figures:
    """Draws prompts that rules can judge, and judges the images.

    Args:
      pipeline: a model trained on `Produce` or on `OpenMoji`.
      samples: prompts of each kind; image i has seed i.
      batch_size: images drawn at a time; chosen for the device by default.

    Raises:
      UserError: no rule judges images of the model's data set.
    """
    source = pipeline.config.data.source

    def draw(prompts: Sequence[str]) -> np.ndarray:
        return pipeline(prompts, batch_size=batch_size)

    if isinstance(source, Produce):
        return _produce(draw, samples)
    if isinstance(source, OpenMoji):
        return _openmoji(draw, samples, source)
    raise UserError(
        f"There is no score for models trained on {type(source).__name__}: evaluate knows Produce "
        "and OpenMoji, whose images rules can check against their prompts."
    )


def _produce(draw: Draw, samples: int) -> Figures:
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
        report = produce_score.report(list(images), scenes)
        figures[name] = {
            attribute: {
                "score": report.score[attribute],
                "ceiling": report.ceiling[attribute],
                "chance": report.chance[attribute],
            }
            for attribute in report.score
        }
    return figures


def _openmoji(draw: Draw, samples: int, source: OpenMoji) -> Figures:
    """People at work in held-out combinations of profession, gender and skin tone."""
    prompts = openmoji_score.held_out_prompts(samples)
    images = draw([prompt.text for prompt in prompts])
    drawings = OpenMoji(split="all", size=source.size, cache=source.cache)
    result = openmoji_score.score(images, [prompt.target for prompt in prompts], drawings)
    joint = {"score": result.joint, "ceiling": result.ceiling, "chance": result.chance}
    parts = {"gender": {"score": result.gender}, "tone": {"score": result.tone}}
    return {"people at work, held-out combinations": {**parts, "joint": joint}}


def table(figures: Figures) -> str:
    """Plain text: a line for each attribute, in percent; its last, "joint", is all of them."""
    lines = []
    for name, attributes in figures.items():
        lines.append(f"{name:<40}{'score':>9}{'ceiling':>9}{'chance':>9}")
        for attribute, row in attributes.items():
            cells = (row.get(column) for column in ("score", "ceiling", "chance"))
            text = "".join(f"{'' if cell is None else f'{cell:.1%}':>9}" for cell in cells)
            lines.append(f"  {attribute:<38}{text}")
    return "\n".join(lines)


def evaluate_folder(folder: str, *, samples: int, batch_size: int | None) -> None:
    """`jaxdiff evaluate`: prints the table, and saves the figures in the model's folder.

    Those of a model that comes with jaxdiff (`shipped:NAME`) are only printed.

    Raises:
      UserError: as `evaluate`; or the folder holds no text-to-image model.
    """
    if samples < 2:
        raise UserError(f"--samples is {samples}: expected at least 2, and 500 for firm figures.")
    bundle = read_bundle(folder)
    figures = evaluate(Pipeline(bundle), samples=samples, batch_size=batch_size)
    print(table(figures))
    print(f"{samples} samples of each kind")
    if not folder.startswith("shipped:"):
        path = epath.Path(folder) / "evaluation.json"
        text = json.dumps({"samples": samples, "figures": figures}, indent=2) + "\n"
        write_whole(path, text.encode())
        print(f"Saved {path}")
