"""`jaxdiff evaluate --sweep`: figures at all combinations of some settings of sampling."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from rich.table import Table

from jaxdiff.cli.sweep import SavedFigures, parse_values
from jaxdiff.cli.sweep_plot import SweepPoint, pareto_front, render_sweep
from jaxdiff.config.serialization import to_json
from jaxdiff.distributed.multihost import is_host0
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import EvalContext, Evaluator, Report
from jaxdiff.evaluation.extraction import remove_parts
from jaxdiff.evaluation.selection import Selection
from jaxdiff.io import images as image_io
from jaxdiff.io.terminal import console, write_line
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.flops import sampling_flops
from jaxdiff.pretrained.bundle import weights_fingerprint
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers import SOLVERS
from jaxdiff.training.run import on_host0, run_evaluators

SWEEP, PLOT = "evaluation_sweep.json", "evaluation_sweep.png"

SETTINGS = ("guidance_scale", "num_steps", "solver")
"""What a sweep may vary."""

UNITS = ((1e12, "TFLOP/image"), (1e9, "GFLOP/image"))


def parse_sweep(words: Sequence[str]) -> list[dict[str, Any]]:
    """Return the points of NAME=VALUES words, all combinations; the last word varies fastest.

    Raises:
      UserError: a word has another form, a name that cannot vary, or two name the same.
    """
    values: dict[str, tuple[Any, ...]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in SETTINGS or name in values:
            raise UserError(
                f"--sweep got {word!r}: expected NAME=VALUES with each of {', '.join(SETTINGS)} "
                "at most once, such as guidance_scale=1:4:0.25 or num_steps=8,12,20."
            )
        values[name] = parse_values(text, f"--sweep {name}")
        for value in values[name]:
            _check(name, value)
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def _check(name: str, value: Any) -> None:
    if name == "solver":
        if value not in SOLVERS:
            raise UserError(f"--sweep solver is {value}: expected one of {', '.join(SOLVERS)}.")
    elif isinstance(value, str):
        raise UserError(f"--sweep {name} is {value!r}: expected numbers.")
    else:
        Sampler(**{name: value})  # which checks its range


def run_sweep(
    points: Sequence[Mapping[str, Any]],
    evaluators: tuple[Evaluator, ...],
    context: EvalContext,
    settings: Mapping[str, Any],
    *,
    folder: epath.Path,
    scalar: str | None,
) -> None:
    """Evaluate a model at all points; write figures, a table and a plot of quality over cost.

    Figures are saved after each point in `evaluation_sweep.json`: a repeated call measures what is
    missing. Those of another model or other settings are measured again.

    Args:
      points: settings of sampling.
      evaluators: with figures.
      context: of the model.
      settings: what else the figures depend on.
      folder: of the files.
      scalar: what the plot shows; the first figure of the first evaluator by default.

    Raises:
      UserError: the model samples no images, or no evaluator reports the scalar.
    """
    if not isinstance(context.spec, TextToImage):
        raise UserError(
            "--sweep varies how images are sampled: expected a text-to-image model; leave it out."
        )
    evaluators = tuple(evaluator for evaluator in evaluators if evaluator.generates)
    if not evaluators:
        raise UserError(
            "--sweep needs an evaluator of sampled images: expected one such as ClipScore(); name "
            "a recipe that has one in --recipe."
        )
    if scalar is not None:
        Selection(scalar=scalar).evaluator(evaluators)  # raises before anything is measured
    fixed = {
        **settings,
        "data": to_json(context.data),
        "spec": to_json(context.spec),
        "evaluators": [to_json(evaluator) for evaluator in evaluators],
        "inputs": [dict(evaluator.fingerprints(context.data)) for evaluator in evaluators],
        "weights": weights_fingerprint(context.params),
    }
    saved = SavedFigures(folder / SWEEP, fixed)
    costs, figures, log = [], [], on_host0(write_line)
    for number, point in enumerate(points, 1):
        arguments = {**context.generation.arguments, **point}
        costs.append(_flops(context.spec, arguments, context.generation.best_of))
        figures.append(saved.measure(point, lambda at=point: _measure(at, evaluators, context)))
        log(f"{number} of {len(points)}: {_label(point)}")
    selection = Selection(scalar=scalar or next(iter(figures[0])))
    goal = selection.goal_of(selection.evaluator(evaluators))
    scale, unit = UNITS[0] if max(costs) >= UNITS[0][0] else UNITS[1]
    shown = [
        SweepPoint(_label(point), cost / scale, selection.value(found))
        for point, cost, found in zip(points, costs, figures, strict=True)
    ]
    if not is_host0():
        return
    if context.parts is not None:
        remove_parts(context.parts)
    front = pareto_front(shown, goal)
    console().print(_table(points, shown, front, (unit, selection.scalar)))
    if any(not math.isnan(point.quality) for point in shown):
        title = f"{context.spec.name}: {len(shown)} settings, Pareto front marked"
        plot = render_sweep(shown, goal, title=title, cost=unit, quality=selection.scalar)
        image_io.save_png(folder / PLOT, plot)
    write_line(f"Saved {folder / SWEEP} and {folder / PLOT}")


def _measure(
    point: Mapping[str, Any], evaluators: tuple[Evaluator, ...], context: EvalContext
) -> Report:
    arguments = {**context.generation.arguments, "sampler": _sampler(point)}
    if "guidance_scale" in point:
        arguments["guidance_scale"] = point["guidance_scale"]
    generation = dataclasses.replace(context.generation, arguments=arguments)
    at = dataclasses.replace(context, generation=generation)
    return run_evaluators(evaluators, at, None, lambda _: None)


def _sampler(point: Mapping[str, Any]) -> Sampler:
    """Return the settings of a point as a sampler that inherits all others."""
    solver = SOLVERS[point["solver"]]() if "solver" in point else None
    return Sampler(solver=solver, num_steps=point.get("num_steps"))


def _flops(spec: TextToImage, arguments: Mapping[str, Any], best_of: int) -> float:
    """Return the model FLOPs of one image; guidance costs a second prediction."""
    scale = arguments.get("guidance_scale")
    sampler = dataclasses.replace(_sampler(arguments), guidance_scale=scale)
    sampler = sampler.inherit(spec.sampler).resolve()
    size = (spec.image_size, spec.image_size)
    return best_of * sampling_flops(spec, sampler, size, num_steps=sampler.num_steps)


def _label(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in point.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _table(
    points: Sequence[Mapping[str, Any]],
    shown: Sequence[SweepPoint],
    front: Sequence[int],
    names: tuple[str, str],
) -> Table:
    table = Table(caption="* on the Pareto front", caption_justify="left")
    for name in (*points[0], *names, ""):
        table.add_column(name, justify="right")
    for i, (point, found) in enumerate(zip(points, shown, strict=True)):
        cells = [_text(value) for value in point.values()]
        table.add_row(*cells, f"{found.cost:.4g}", f"{found.quality:.4g}", "*" * (i in front))
    return table
