"""Keep the model that an evaluator scores best, and end a run that no longer improves."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath
from jaxtyping import PyTree

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Natural, NotNegative
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.distributed.multihost import broadcast_text, run_on_host0
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Evaluator
from jaxdiff.evaluation.selection import Selection
from jaxdiff.io.text import format_json, parse_json, read_json
from jaxdiff.pretrained.bundle import CHECKPOINTS, CONFIG, write_json, write_tokenizers
from jaxdiff.training.checkpoint import Checkpoints

BEST = "best"
"""Folder of the best model in that of its run: a run as well, with the frozen parts of that one."""

NOTES = "best.json"
"""File with `BestSoFar`: of a checkpoint, at its step, and beside the best model, at the end."""


@checked
@dataclass(frozen=True, kw_only=True)
class BestCheckpoint(Selection):
    """Keep the moving average of the best step, in `best/` of the run, and stop early.

    Attributes:
      patience: evaluations in a row that are not better, after which training ends; 0 for never.
      min_change: least difference from the best value that counts as better.
    """

    patience: Natural = 0
    min_change: NotNegative = 0.0

    def check(self, evaluators: tuple[Evaluator, ...]) -> Evaluator:
        """Return the evaluator of the scalar, which must run during training.

        Raises:
          UserError: there is none, or it runs at the end alone.
        """
        evaluator = self.evaluator(evaluators)
        if evaluator.every == 0:
            raise UserError(
                f"best.scalar is {self.scalar!r} but its evaluator runs at the end alone: expected "
                "one that runs during training; set its `every`."
            )
        return evaluator


@dataclass(frozen=True, kw_only=True)
class BestSoFar:
    """The state of the search for the best step, in checkpoints.

    Attributes:
      scalar: by which steps are compared.
      step: the best one; 0 for none yet.
      value: of the scalar there.
      waited: evaluations since then.
      at: step of the last evaluation.
    """

    scalar: str
    step: int = 0
    value: float | None = None
    waited: int = 0
    at: int = 0


class BestModel:
    """Follow a scalar over a run; without `settings` do nothing.

    Every process of a multi-host run creates one and makes the same calls.

    Args:
      folder: of the run.
      config: the recipe, as JSON, which the folder of the best model holds too.
      tokenizers: likewise.
      settings: what is followed.
      evaluators: of the recipe.
      notes: of the checkpoint that the run resumes from; None for a new run.
      restored: step of that checkpoint; 0 for a new run.
      report: called with one sentence for each problem that does not end the run.
    """

    def __init__(
        self,
        folder: epath.Path,
        *,
        config: Any,
        tokenizers: Mapping[str, TextTokenizer],
        settings: BestCheckpoint | None,
        evaluators: tuple[Evaluator, ...],
        notes: str | None,
        restored: int,
        report: Callable[[str], None],
    ):
        self._settings = settings
        if settings is None:
            return
        self._evaluator = settings.check(evaluators)
        self._report = report
        self._folder, self._config, self._tokenizers = folder / BEST, config, tokenizers
        self._store = Checkpoints(self._folder / CHECKPOINTS, keep=1, report=report)
        self._now = BestSoFar(scalar=settings.scalar)
        earlier = parse_json(notes, NOTES) if notes else {}
        if (path := self._folder / NOTES).exists():  # after the evaluation of an earlier end
            last = read_json(path)
            earlier = last if last.get("at") == restored else earlier
        if earlier.get("scalar") == settings.scalar:
            self._now = BestSoFar(**earlier)

    @property
    def should_stop(self) -> bool:
        """Whether `patience` is exhausted."""
        patience = self._settings.patience if self._settings else 0
        return patience > 0 and self._now.waited >= patience

    @property
    def notes(self) -> dict[str, str]:
        """The files that a checkpoint takes with it."""
        if self._settings is None:
            return {}
        return {NOTES: format_json(dataclasses.asdict(self._now))}

    @property
    def summary(self) -> dict[str, Any]:
        """The best step and why training ended, for the summary of the run."""
        if self._settings is None:
            return {}
        now = self._now
        patience = self._settings.patience
        why = f"{patience} evaluations in a row without a better {now.scalar}"
        ended = {"ended": why if self.should_stop else "all steps were taken"}
        best = {"best": {"scalar": now.scalar, "step": now.step, "value": now.value}}
        return ended | (best if now.step else {})

    def after(self, step: int, scalars: Mapping[str, float], average: PyTree) -> None:
        """Take the figures of an evaluation; where they are the best ones, write the average.

        An evaluation without the scalar is reported, and does not count.
        """
        settings = self._settings
        if settings is None or not any(k.startswith(f"{self._evaluator.prefix}/") for k in scalars):
            return
        if step == self._now.at:  # training ended early: evaluated at its interval, and at the end
            return
        try:
            reported = settings.value(dict(scalars))
        except UserError as error:
            self._report(f"best.scalar keeps no model at step {step}: {error}")
            return
        # Hosts may differ in the last bits of a figure, but not in what they decide.
        found = broadcast_text(format_json(reported))
        value, now = parse_json(found, settings.scalar), self._now
        if value is None or not settings.is_better(
            value, now.value, self._evaluator, settings.min_change
        ):
            self._now = dataclasses.replace(now, waited=now.waited + 1, at=step)
            return
        self._now = BestSoFar(scalar=settings.scalar, step=step, value=value, at=step)
        run_on_host0(self._write_recipe)
        self._store.save_parts(step, {"ema": average})

    def _write_recipe(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / CONFIG).exists():
            write_tokenizers(self._folder, self._tokenizers)
            write_json(self._folder / CONFIG, self._config)

    def wait(self) -> None:
        """Wait until the best model is on disk.

        Raises:
          UserError: it could not be written.
        """
        if self._settings is not None:
            self._store.wait()

    def finish(self) -> None:
        """Wait as `wait` does, and write the notes, which include the evaluation at the end."""
        self.wait()
        if self._settings is not None:
            run_on_host0(self._write_notes)

    def _write_notes(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / NOTES, dataclasses.asdict(self._now))

    def __enter__(self) -> "BestModel":
        return self

    def __exit__(self, *error) -> None:
        if self._settings is not None:
            self._store.__exit__(*error)
