"""`jaxdiff ema`: average the weights of a run with a width chosen after training."""

import dataclasses
import functools
from typing import Annotated

import numpy as np
import tyro
from etils import epath

from jaxdiff.cli.export import DTYPES
from jaxdiff.cli.parsing import parse_flags
from jaxdiff.cli.sweep import SavedFigures, parse_values
from jaxdiff.config.checked import check_value, checked
from jaxdiff.config.fields import Choices, Range
from jaxdiff.config.serialization import to_json, types_in
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import EvalContext, Goal, Report, with_samples
from jaxdiff.evaluation.selection import Selection
from jaxdiff.io.files import write_whole
from jaxdiff.io.lock import lock_folder, output_folder
from jaxdiff.io.terminal import write_line
from jaxdiff.io.text import check_text, format_json
from jaxdiff.pretrained.bundle import Bundle, write_bundle
from jaxdiff.pretrained.model_card import (
    ORIGIN,
    check_destination,
    folder_card,
    remove_export,
    write_card,
)
from jaxdiff.pretrained.run_folder import read_run
from jaxdiff.pretrained.safetensors_io import to_device
from jaxdiff.training.held_out import bundle_metrics
from jaxdiff.training.post_hoc_ema import StoredAverages, Width
from jaxdiff.training.recipe import Config
from jaxdiff.training.run import run_evaluators
from jaxdiff.training.workdir import read_config

SEARCH = "ema_search.json"


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """Average the weights of a run with any width, from the snapshots of its recipe's
    `ema.post_hoc`, and write the model as a folder, as `jaxdiff export` does.
    """

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run."""
    width: Width | None = None
    """Standard deviation of the average's profile, relative to the length of the run."""
    search: str | None = None
    """Scalar of an evaluator of the recipe, such as `clip_score/score`; the best of --widths is
    written. Figures are kept in `ema_search.json` of the run: the same command resumes."""
    widths: str = "0.02:0.2:0.02"
    """Widths of --search, LOW:HIGH:STEP or A,B,C."""
    goal: Goal | None = None
    """Which value of the scalar is best; that of the evaluator by default."""
    samples: Annotated[int | None, Range(2)] = None
    """Samples of the evaluator; those of the recipe by default."""
    out: str | None = None
    """Folder to write; RUN/ema_WIDTH by default."""
    dtype: Annotated[str, Choices(DTYPES)] = "bfloat16"
    """Type of the weights: bfloat16, float16 or float32."""


def ema_command(arguments: list[str]) -> None:
    """Run `jaxdiff ema RUN --width WIDTH` or `jaxdiff ema RUN --search SCALAR`."""
    options = parse_flags(EmaOptions, arguments, prog="jaxdiff ema")
    if (options.width is None) == (options.search is None):
        raise UserError(
            "jaxdiff ema writes one average: expected either --width, such as --width 0.05, or "
            "--search with an evaluator's scalar."
        )
    widths = tuple(
        check_value("--widths", value, Width) for value in parse_values(options.widths, "--widths")
    )
    average_model(options, widths)


def average_model(options: EmaOptions, widths: tuple[float, ...]) -> None:
    """Write the average of a width, or of the best of some widths.

    Raises:
      UserError: the run has no snapshots of averages, or the search fails.
    """
    config = read_config(options.run)
    averages = StoredAverages(options.run, write_line)
    width = options.width
    if options.search is not None:
        with lock_folder(options.run):
            width = search_width(options, config, averages, widths)
    assert width is not None
    out = options.out or str(epath.Path(options.run) / f"ema_{width:g}")
    check_text(out, "The output folder")
    check_destination(out)
    with output_folder(out):
        _write(out, options, config, averages, width)
    write_line(f"Wrote {out}, averaged with width {width:g} up to step {averages.last_step}.")


def search_width(
    options: EmaOptions, config: Config, averages: StoredAverages, widths: tuple[float, ...]
) -> float:
    """Evaluate the averages of several widths, print a line for each, and return the best width.

    Raises:
      UserError: no evaluator reports the scalar, or it is not a number for any width.
    """
    assert options.search is not None
    selection = Selection(scalar=options.search, goal=options.goal)
    evaluator = with_samples(selection.evaluator(config.evaluators), options.samples)
    evaluator.check(config.task.model, config.data)
    settings = {
        "evaluator": to_json(evaluator),
        "inputs": dict(evaluator.fingerprints(config.data)),
        "step": averages.last_step,
    }
    saved = SavedFigures(epath.Path(options.run) / SEARCH, settings)

    def measure(width: float) -> Report:
        bundle = _bundle(options, config, averages, width)
        loss = functools.partial(bundle_metrics, config, bundle)
        context = EvalContext(averages.last_step, *bundle, config.data, loss=loss)
        return run_evaluators((evaluator,), context, None, lambda _: None)

    best, best_width = None, None
    for width in widths:
        value = selection.value(saved.measure({"width": width}, lambda w=width: measure(w)))
        write_line(f"width {width:<6g} {selection.scalar} {value:.6g}")
        if selection.is_better(value, best, evaluator):
            best, best_width = value, width
    if best_width is None:
        raise UserError(
            f"{selection.scalar} is not a number for any of the widths: expected one; choose "
            "another scalar."
        )
    write_line(f"Best width: {best_width:g}")
    return best_width


def _bundle(options: EmaOptions, config: Config, averages: StoredAverages, width: float) -> Bundle:
    """Return the model of the run with averaged weights."""
    trained = averages.of_width(width)
    return read_run(
        options.run, to_json(config), lambda x: to_device(np.asarray(x)), types_in(config), trained
    )


def _write(
    out: str, options: EmaOptions, config: Config, averages: StoredAverages, width: float
) -> None:
    bundle = _bundle(options, config, averages, width)
    remove_export(out)
    write_bundle(out, bundle, options.dtype, recipe=to_json(config))
    origin = {"run": options.run, "width": width, "step": averages.last_step}
    write_whole(epath.Path(out) / ORIGIN, f"{format_json(origin, indent=2)}\n".encode())
    write_card(out, folder_card(out))
