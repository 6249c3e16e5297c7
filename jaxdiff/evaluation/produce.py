"""Attribute accuracy on rendered produce."""

import functools
from dataclasses import dataclass
from typing import Annotated, ClassVar

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Natural, Range
from jaxdiff.data.loader import DataConfig
from jaxdiff.datasets.produce import score as scoring
from jaxdiff.datasets.produce.source import full_caption
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import (
    EvalContext,
    Evaluator,
    Label,
    Report,
    check_text_to_image,
    table,
)
from jaxdiff.pretrained.bundle import AnySpec


@checked
@dataclass(frozen=True, kw_only=True)
class ProduceAccuracy(Evaluator):
    """Fractions of images whose attributes, as a rule-based detector finds them, match the prompt.

    Sets: single objects in held-out and in trained combinations, and pairs. "ceiling" is the
    accuracy on rendered scenes, "chance" that of images against other prompts, and "latents", for
    latent models, that of rendered scenes after the autoencoder.

    Attributes:
      samples: prompts of each set.
      every: steps between evaluations; 0 evaluates at the end alone.
      label: names its figures and images in the place of `name`.

    Raises:
      UserError: fewer than two samples.
    """

    name: ClassVar[str] = "produce"
    samples: Annotated[int, Range(2)] = 500
    every: Natural = 0
    label: Label = None

    def check(self, spec: AnySpec, data: DataConfig) -> None:
        """Raise `UserError` for images of another size than the detector's."""
        size = check_text_to_image(spec, self).image_size
        if size != scoring.SIZE:
            raise UserError(
                f"evaluator {self.prefix!r} cannot score images of {size} pixels: expected "
                f"{scoring.SIZE}; leave the evaluator out."
            )

    def evaluate(self, context: EvalContext) -> Report:
        """Generate and score images for all sets."""
        self.check(context.spec, context.data)
        spec = check_text_to_image(context.spec, self)
        scenes_of = functools.partial(scoring.evaluation_scenes, self.samples)
        sets = {
            "single objects, held-out combinations": scenes_of("held_out", "single"),
            "single objects, trained combinations": scenes_of("train", "single"),
            "two objects": scenes_of("train", "two"),
        }
        results, prompts = {}, {}
        for name, scenes in sets.items():
            prompts[name] = [full_caption(scene) for scene in scenes]
            images = context.generate(prompts[name])
            true = scoring.render_scenes(scenes)
            columns = {
                "score": scoring.score_scenes(images, scenes),
                "ceiling": scoring.score_scenes(true, scenes),
                "chance": scoring.chance(images, scenes),
            }
            if spec.autoencoder is not None:
                columns["latents"] = scoring.score_scenes(context.pipeline.autoencode(true), scenes)
            results[name] = columns
        return table(results, prompts)
