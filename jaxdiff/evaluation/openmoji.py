"""Accuracy on OpenMoji's people at work: whether the nearest emoji is the prompted one."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Natural, Range
from jaxdiff.data.loader import DataConfig
from jaxdiff.datasets.openmoji import score as scoring
from jaxdiff.datasets.openmoji.source import OpenMoji
from jaxdiff.evaluation.evaluator import (
    EvalContext,
    Evaluator,
    Label,
    Report,
    check_drawings,
    table,
)
from jaxdiff.pretrained.bundle import AnySpec


@checked
@dataclass(frozen=True, kw_only=True)
class OpenMojiAccuracy(Evaluator):
    """Fractions of images whose nearest emoji is that of the prompt, held-out combinations.

    Attributes:
      samples: prompts.
      every: steps between evaluations; 0 evaluates at the end alone.
      label: names its figures and images in the place of `name`.

    Raises:
      UserError: fewer than two samples.
    """

    name: ClassVar[str] = "openmoji"
    samples: Annotated[int, Range(2)] = 500
    every: Natural = 0
    label: Label = None

    def check(self, spec: AnySpec, data: DataConfig) -> None:
        """Raise `UserError` for other data than OpenMoji, or another size."""
        check_drawings(spec, data, self, OpenMoji, "OpenMoji's emoji")

    def evaluate(self, context: EvalContext) -> Report:
        """Generate and score images."""
        source = check_drawings(context.spec, context.data, self, OpenMoji, "OpenMoji's emoji")
        prompts = scoring.held_out_prompts(self.samples)
        texts = [prompt.text for prompt in prompts]
        images = context.generate(texts)
        emoji = OpenMoji(split="all", size=source.size, cache=source.cache)
        result = scoring.score_workers(images, [prompt.target for prompt in prompts], emoji)
        name = "people at work, held-out combinations"
        return table({name: result._asdict()}, {name: texts})
