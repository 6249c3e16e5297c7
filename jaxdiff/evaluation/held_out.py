"""Loss on records that a run does not train on, by noise level for diffusion."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Natural
from jaxdiff.data.loader import DataConfig
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import EvalContext, Evaluator, Goal, Label, Report
from jaxdiff.pretrained.bundle import AnySpec


@checked
@dataclass(frozen=True, kw_only=True)
class HeldOutLoss(Evaluator):
    """The task's loss and its other metrics, means over held-out records, `data.held_out`.

    Noise, times and views of the records are the same in each evaluation, and all noise levels
    count, whatever a curriculum trains on. Losses of a diffusion task by noise level, in ten bins
    of t, are "loss_by_level/0" to "loss_by_level/9". The contrastive loss of CLIP depends on the
    number of records in a batch.

    Attributes:
      samples: records, rounded down to whole batches, but at least one batch.
      every: steps between evaluations; 0 evaluates at the end alone.
      label: names its figures and images in the place of `name`.
    """

    name: ClassVar[str] = "held_out"
    generates: ClassVar[bool] = False
    goal: ClassVar[Goal] = "min"
    samples: Count = 1024
    every: Natural = 0
    label: Label = None

    def check(self, spec: AnySpec, data: DataConfig) -> None:
        """Raise `UserError` for data without held-out records."""
        if data.held_out == 0:
            raise UserError(
                f"evaluator {self.prefix!r} needs records that are not trained on but "
                "data.held_out is 0: set it to a share such as 0.01, or leave the evaluator out."
            )

    def evaluate(self, context: EvalContext) -> Report:
        """Compute the loss."""
        self.check(context.spec, context.data)
        if context.loss is None:
            raise UserError(
                f"evaluator {self.prefix!r} needs the loss of a recipe's task: expected a recipe "
                "of this model; leave the evaluator out."
            )
        metrics, about = context.loss(self.samples)
        scalars: dict[str, float] = {}
        for name, value in metrics.items():
            if value.ndim:
                parts = {f"{name}/{i}": float(x) for i, x in enumerate(value)}
                scalars |= {key: x for key, x in parts.items() if np.isfinite(x)}
            else:
                scalars[name] = float(value)
        figures = ", ".join(f"{name} {x:.4g}" for name, x in scalars.items() if "/" not in name)
        levels = " ".join(f"{x:.4g}" for name, x in scalars.items() if "/" in name)
        text = f"held out, {about['records']} records: {figures}" + (
            f"\n  by noise level, low to high: {levels}" * bool(levels)
        )
        return Report(scalars=scalars, text=text, provenance=dict.fromkeys(scalars, about))
