"""A run: train a recipe, and evaluate it at intervals and at the end."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree, UInt8

from jaxdiff.config.serialization import to_json
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.distributed.mesh import make_mesh
from jaxdiff.distributed.multihost import broadcast_text, held_on_host0, is_host0
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import EvalContext, Evaluator, Report, check_evaluators
from jaxdiff.evaluation.held_out import HeldOutLoss
from jaxdiff.evaluation.provenance import provenance_of
from jaxdiff.io import images as image_io
from jaxdiff.io.files import file_errors_as_user_errors, write_whole
from jaxdiff.io.lock import output_folder
from jaxdiff.io.terminal import write_text
from jaxdiff.io.text import format_json, parse_json, read_json
from jaxdiff.training.best import BEST
from jaxdiff.training.held_out import held_out_metrics, held_out_records
from jaxdiff.training.loop import Result, train
from jaxdiff.training.recipe import Config
from jaxdiff.training.state import TrainState
from jaxdiff.training.workdir import SUMMARY

Log = Callable[[str], None]


def run_recipe(config: Config, out: str, *, fresh: bool = False, log: Log = write_text) -> Result:
    """Train a recipe in the folder `out`, then evaluate it and write `summary.json`.

    The summary is written before the evaluation and again with its figures, so that a failing
    evaluator loses nothing. Repeating the command evaluates a run that was not evaluated yet.

    Raises:
      UserError: as `jaxdiff.training.loop.train`; or, before training, for a model or data that an
        evaluator does not support, or a scalar of `best` that none reports.
    """
    folder = epath.Path(out)
    log = on_host0(log)
    evaluators = config.evaluators if config.train.evaluate else ()
    check_evaluators(evaluators, config.task.model, config.data)
    if any(isinstance(evaluator, HeldOutLoss) for evaluator in evaluators):
        config.data.source.check()
        held_out_records(config.data, config.train.batch_size // config.train.accumulate)
    if config.best is not None and config.train.evaluate:
        config.best.check(evaluators)

    def evaluate(
        state: TrainState,
        frozen: PyTree,
        tokenizers: Mapping[str, TextTokenizer],
        due: tuple[Evaluator, ...],
        failed: Log | None = None,
    ) -> Report:
        context = eval_context(config, state, frozen, tokenizers)
        return run_evaluators(due, context, folder / "samples", log, failed)

    def finish(result: Result) -> Report:
        earlier = parse_json(broadcast_text(format_json(_read_summary(folder))), folder / SUMMARY)
        if earlier.get("fingerprint") == result.summary["fingerprint"]:
            result.summary.clear()
            result.summary.update(earlier)  # whose speeds are those of the training
        if "evaluation" in result.summary:
            log(f"{folder} is evaluated already; jaxdiff evaluate {folder} does it again.")
            return Report()
        _write_summary(folder, result)
        if not evaluators:
            return Report()
        report = evaluate(result.state, result.frozen, result.tokenizers, evaluators)
        result.summary["evaluation"] = dict(report.scalars)
        result.summary["provenance"] = provenance_of(report)
        _write_summary(folder, result)
        return report

    # During training a failing evaluator is reported. On many hosts it ends the run, as the others
    # would wait for a host that fails alone.
    failed = log if jax.process_count() == 1 else None
    in_training = functools.partial(evaluate, failed=failed)
    with held_on_host0(output_folder(folder)), file_errors_as_user_errors(folder):
        result = train(
            config,
            folder,
            fresh=fresh,
            evaluate=in_training if evaluators else None,
            finish=finish,
            log=log,
        )
        if result.finished:
            _write_summary(folder, result)
    end = f"Finished at step {result.summary['step']}: {folder}"
    if "ended" in result.summary:
        end += f" ({result.summary['ended']})"
    if best := result.summary.get("best"):
        end += f"; best step {best['step']}, {best['scalar']} {best['value']:.6g}: {folder / BEST}"
    if not result.finished:
        end = f"Stopped at step {result.summary['step']}; the same command resumes there."
    log(end)
    return result


def eval_context(
    config: Config, state: TrainState, frozen: PyTree, tokenizers: Mapping[str, TextTokenizer]
) -> EvalContext:
    """Return the context of evaluators: the model with its moving average."""
    task, mesh = config.task, make_mesh(config.mesh)
    params = task.model_params(state.ema, frozen)
    loss = functools.partial(held_out_metrics, config, state.ema, frozen, tokenizers, mesh)
    return EvalContext(
        int(state.step), task.model, params, tokenizers, config.data, mesh=mesh, loss=loss
    )


def run_evaluators(
    evaluators: tuple[Evaluator, ...],
    context: EvalContext,
    images: epath.Path | None,
    log: Log,
    failed: Log | None = None,
) -> Report:
    """Run evaluators, log their tables and save their images.

    Args:
      evaluators: in this order.
      context: of the model.
      images: folder of the images, `step_N.png` and `step_N_NAME.png`, with the
        evaluator's label before NAME; None saves none.
      log: called with a table or a path.
      failed: called with a sentence for each evaluator that raises a `UserError`, whose figures
        are left out; None raises the error.

    Returns:
      All scalars, named EVALUATOR/SCALAR, with their provenance, and all images, named
      EVALUATOR/IMAGE.
    """
    scalars: dict[str, float] = {}
    shown: dict[str, UInt8[np.ndarray, "h w 3"]] = {}
    provenance: dict[str, Mapping[str, Any]] = {}
    for evaluator in evaluators:
        try:
            report = evaluator.evaluate(context)
        except UserError as error:
            if failed is None:
                raise
            failed(f"No figures of {evaluator.prefix!r} at step {context.step}: {error}")
            continue
        scalars |= {f"{evaluator.prefix}/{name}": x for name, x in report.scalars.items()}
        shown |= {f"{evaluator.prefix}/{name}": x for name, x in report.images.items()}
        other = {"evaluator": to_json(evaluator)}  # of one's own, which states no provenance
        provenance |= {
            f"{evaluator.prefix}/{name}": report.provenance.get(name, other)
            for name in report.scalars
        }
        if report.text:
            log(report.text)
        if images is None or not is_host0():
            continue
        for name, image in report.images.items():
            ends = (evaluator.label, None if name == "samples" else name)
            end = "".join(f"_{one}" for one in ends if one)
            path = images / f"step_{context.step:06d}{end}.png"
            image_io.save_png(path, image)
            log(f"{name.capitalize()}: {path}")
    return Report(scalars=scalars, images=shown, provenance=provenance)


def on_host0(log: Log) -> Log:
    """Return `log` on the first host, and a function that does nothing on the others."""
    return log if is_host0() else lambda _: None


def _read_summary(folder: epath.Path) -> dict[str, Any]:
    """Return the summary of an earlier end of the run; {} where none can be read."""
    try:
        return read_json(folder / SUMMARY)
    except UserError:
        return {}


def _write_summary(folder: epath.Path, result: Result) -> None:
    if is_host0():
        text = format_json(result.summary, indent=2) + "\n"
        write_whole(folder / SUMMARY, text.encode())
