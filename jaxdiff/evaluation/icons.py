"""Accuracy on everyday things: whether images show the prompted thing, style and pair."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Natural, Range
from jaxdiff.data.loader import DataConfig
from jaxdiff.datasets.icons.emoji_scenes import EmojiScenes
from jaxdiff.datasets.icons.names import STYLES
from jaxdiff.datasets.icons.scene import Share
from jaxdiff.datasets.icons.score import IconJudge, SceneKind, icon_prompts, icon_scenes
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import (
    EvalContext,
    Evaluator,
    Label,
    Report,
    check_drawings,
    check_text_to_image,
    table,
)
from jaxdiff.pretrained.bundle import AnySpec

_NAMES: dict[tuple[SceneKind, Share], str] = {
    ("single", "held_out"): "single things, held-out styles",
    ("single", "train"): "single things, trained styles",
    ("two", "held_out"): "two things, held-out pairs",
    ("two", "train"): "two things, trained pairs",
}


@checked
@dataclass(frozen=True, kw_only=True)
class IconAccuracy(Evaluator):
    """Fractions of images whose nearest drawing, of all things and styles, is the prompted one.

    "ceiling" is the accuracy on disturbed true scenes, "chance" that of images against other
    prompts, and "latents", for latent models, that of true scenes after the autoencoder.

    Attributes:
      samples: prompts of each of four sets.
      every: steps between evaluations; 0 evaluates at the end alone.
      label: names its figures and images in the place of `name`.

    Raises:
      UserError: fewer than two samples.
    """

    name: ClassVar[str] = "icons"
    samples: Annotated[int, Range(2)] = 500
    every: Natural = 0
    label: Label = None

    def check(self, spec: AnySpec, data: DataConfig) -> None:
        """Raise `UserError` for other data than EmojiScenes, another size, or no held-out style."""
        source = check_drawings(spec, data, self, EmojiScenes, "drawings of things")
        if STYLES.keys().isdisjoint(source.sets):
            raise UserError(
                f"evaluator {self.prefix!r} scores held-out styles but data.source.sets has none: "
                f"expected one of {', '.join(STYLES)}; add it, or leave the evaluator out."
            )

    def evaluate(self, context: EvalContext) -> Report:
        """Generate and score images."""
        spec = check_text_to_image(context.spec, self)
        source = check_drawings(spec, context.data, self, EmojiScenes, "drawings of things")
        judge = IconJudge(source)
        results, prompts = {}, {}
        for (kind, share), name in _NAMES.items():
            scenes = icon_scenes(source, self.samples, share, kind)
            prompts[name] = icon_prompts(scenes)
            images = context.generate(prompts[name])
            columns = judge.score(images, scenes)._asdict()
            if spec.autoencoder is not None:
                true = np.stack([source.compose(scene) for scene in scenes])
                columns["latents"] = judge.fractions(context.pipeline.autoencode(true), scenes)
            results[name] = columns
        return table(results, prompts)
