"""Choose among models by one scalar of an evaluator: which is best, and when to stop looking."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Text
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Evaluator, Goal, check_prefixes


@checked
@dataclass(frozen=True, kw_only=True)
class Selection:
    """The scalar by which models are compared.

    Attributes:
      scalar: its name in metrics, EVALUATOR/SCALAR, such as "clip_score/score".
      goal: whether the least or the largest value is best; None is the evaluator's own.
    """

    scalar: Annotated[str, Text()]
    goal: Goal | None = None

    def evaluator(self, evaluators: Iterable[Evaluator]) -> Evaluator:
        """Return the evaluator that reports the scalar.

        Raises:
          UserError: none does, or two have one name.
        """
        found = [e for e in evaluators if e.has_figures]
        check_prefixes(found)
        for evaluator in found:
            if self.scalar.startswith(f"{evaluator.prefix}/"):
                names = evaluator.figure_names()
                if names is not None:
                    self._check(sorted(f"{evaluator.prefix}/{name}" for name in names))
                return evaluator
        names = ", ".join(f"{e.prefix}/..." for e in found) or "none, as it has no such evaluators"
        raise UserError(
            f"no evaluator of the recipe reports {self.scalar!r}: expected one of {names}; name "
            "the scalar as metrics.jsonl does, or add its evaluator to the recipe."
        )

    def value(self, scalars: dict[str, float]) -> float:
        """Return the scalar of a report; NaN is allowed, and never best.

        Raises:
          UserError: the report lacks it.
        """
        self._check(scalars)
        return float(scalars[self.scalar])

    def _check(self, names: Collection[str]) -> None:
        if self.scalar not in names:
            raise UserError(
                f"the evaluator reports no {self.scalar!r}: expected one of {', '.join(names)}; "
                "name one of them."
            )

    def is_better(
        self, value: float, than: float | None, evaluator: Evaluator, by: float = 0.0
    ) -> bool:
        """Whether a value is better than another, by more than `by`, or than none."""
        if math.isnan(value):
            return False
        if than is None:
            return True
        gain = than - value if self.goal_of(evaluator) == "min" else value - than
        return gain > by

    def goal_of(self, evaluator: Evaluator) -> Goal:
        """Return which value of the scalar is best."""
        return self.goal or evaluator.goal_of(self.scalar.removeprefix(f"{evaluator.prefix}/"))
