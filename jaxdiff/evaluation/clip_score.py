"""CLIP score and retrieval: how well images match their captions, for any data with captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float32, Int

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Natural, Range
from jaxdiff.data.loader import DataConfig
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import (
    EvalContext,
    Evaluator,
    Label,
    Report,
    check_text_to_image,
    digest_of_texts,
    image_source,
    shortage_text,
)
from jaxdiff.evaluation.extraction import generated_features, image_features
from jaxdiff.evaluation.features import clip_score_network
from jaxdiff.evaluation.image_sets import DataImages
from jaxdiff.pipelines.auxiliary_models import clip_text_vectors
from jaxdiff.pretrained.bundle import AnySpec
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance

_BLOCK = 1024  # vectors that are compared with all others at a time


@checked
@dataclass(frozen=True, kw_only=True)
class ClipScore(Evaluator):
    """Mean cosine of images and captions in a CLIP (Hessel et al. 2021), times 100.

    Captions are those of records spread over the data; image i has seed i. "data" is the score of
    their own images, "chance" that of the generated images with the captions shifted by half of
    their number. "retrieval" is the fraction of images whose caption is the nearest of all, and
    "text_retrieval" that of captions whose image is; equal captions count as one. "retrieval_data"
    and "text_retrieval_data" are those of the data's own images.

    Attributes:
      samples: captions.
      clip_model: the CLIP; scores of different ones cannot be compared.
      every: steps between evaluations; 0 evaluates at the end alone.
      label: names its figures and images in the place of `name`.

    Raises:
      UserError: fewer than two samples.
    """

    name: ClassVar[str] = "clip_score"
    samples: Annotated[int, Range(2)] = 64
    clip_model: str = ClipGuidance.model
    every: Natural = 0
    label: Label = None

    def check(self, spec: AnySpec, data: DataConfig) -> None:
        """Raise `UserError` for a model without text, unknown images, or without the CLIP."""
        self._check_data(spec, data)
        clip_score_network(self.clip_model)

    def figure_names(self) -> frozenset[str]:
        """Return the names of its scalars."""
        ends = ("retrieval", "retrieval_data")
        return frozenset(("score", "data", "chance", *ends, *(f"text_{end}" for end in ends)))

    def fingerprints(self, data: DataConfig) -> Mapping[str, str]:
        """Return those of the CLIP and of the records."""
        records = DataImages(data, self.samples).fingerprint
        return {**clip_score_network(self.clip_model).provenance, "records": records}

    def _check_data(self, spec: AnySpec, data: DataConfig) -> None:
        check_text_to_image(spec, self)
        if image_source(data) is None:
            raise UserError(
                f"evaluator {self.prefix!r} needs images but data.source is cached latents: set "
                "data.source.of to the original data, or leave the evaluator out."
            )

    def evaluate(self, context: EvalContext) -> Report:
        """Generate and score images."""
        self._check_data(context.spec, context.data)
        network, records = (
            clip_score_network(self.clip_model),
            DataImages(context.data, self.samples),
        )
        captions = records.captions()
        if len(captions) < 2:
            raise UserError(
                f"evaluator {self.prefix!r} found {len(captions)} usable records with a caption: "
                "expected at least 2; repair the data, or leave the evaluator out."
            )
        text = clip_text_vectors(self.clip_model, captions)
        image = np.concatenate(list(generated_features(context, network, captions)))
        own = np.concatenate(list(image_features(network, records, context.parts)))
        shifted = np.roll(text, max(1, len(captions) // 2), axis=0)
        pairs = {"score": (image, text), "data": (own, text), "chance": (image, shifted)}
        scalars = {
            name: 100 * float(np.mean(np.sum(a * b, axis=1))) for name, (a, b) in pairs.items()
        }
        summary = ", ".join(f"{name} {value:.1f}" for name, value in scalars.items())
        found = {}
        for end, vectors in (("", image), ("_data", own)):
            both = retrieval(vectors, text, captions)
            found |= {f"retrieval{end}": both[0], f"text_retrieval{end}": both[1]}
        scalars |= found
        summary += "; " + ", ".join(f"{name} {value:.1%}" for name, value in found.items())
        images = f"{len(image)} images{shortage_text(len(image), self.samples)}"
        about = {
            **network.provenance,
            "images": len(image),
            "prompts": digest_of_texts(captions),
        }
        return Report(
            scalars=scalars,
            text=f"CLIP score ({self.clip_model}), {images}: {summary}",
            provenance=dict.fromkeys(scalars, about),
        )


def retrieval(
    images: Float32[np.ndarray, "n e"], texts: Float32[np.ndarray, "n e"], captions: Sequence[str]
) -> tuple[float, float]:
    """Return recall at 1 of captions by images, and of images by captions.

    Args:
      images: unit vectors.
      texts: unit vectors of the captions.
      captions: of the images; equal ones are the same.
    """
    names = np.array(captions)
    by_image, by_text = names[_nearest(images, texts)], names[_nearest(texts, images)]
    return float((by_image == names).mean()), float((by_text == names).mean())


def _nearest(
    vectors: Float32[np.ndarray, "n e"], others: Float32[np.ndarray, "m e"]
) -> Int[np.ndarray, " n"]:
    """Return the index of the nearest of the others, comparing some vectors with all at a time."""
    starts = range(0, len(vectors), _BLOCK)
    found = [(vectors[start : start + _BLOCK] @ others.T).argmax(axis=1) for start in starts]
    return np.concatenate(found)
