"""Evaluators that show images: grids of prompts, and reconstructions."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import UInt8

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Natural
from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.loader import DataConfig
from jaxdiff.distributed.multihost import to_host
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import (
    EvalContext,
    Evaluator,
    Label,
    Report,
    check_text_to_image,
    image_source,
)
from jaxdiff.io import images as image_io
from jaxdiff.models.autoencoders.base import AutoencoderSpec
from jaxdiff.models.layers import bind_build, bind_params
from jaxdiff.models.text_to_image import from_uint8
from jaxdiff.pretrained.bundle import AnySpec


@checked
@dataclass(frozen=True, kw_only=True)
class SampleGrid(Evaluator):
    """A grid of images of some prompts, and a strip of estimates from noise to image.

    Attributes:
      prompts: one image each, with seeds from 0.
      snapshots: estimates in the strip.
      every: steps between evaluations; 0 evaluates at the end alone.
      label: names its figures and images in the place of `name`.
    """

    name: ClassVar[str] = "samples"
    has_figures: ClassVar[bool] = False
    prompts: tuple[str, ...]
    snapshots: Count = 8
    every: Natural = 0
    label: Label = None

    def check(self, spec: AnySpec, data: DataConfig) -> None:
        """Raise `UserError` for a model without text, or no prompts."""
        check_text_to_image(spec, self)
        if not self.prompts:
            raise UserError(
                f"evaluator {self.prefix!r} has no prompts: give some, or leave it out."
            )

    def evaluate(self, context: EvalContext) -> Report:
        """Generate the images."""
        prompts = list(self.prompts)
        estimates = context.pipeline.snapshots(prompts, self.snapshots)
        return Report(
            images={
                "samples": image_io.grid(estimates[-1], captions=prompts, scale=2),
                "strip": image_io.strip(estimates[:, :4]),
            }
        )


@checked
@dataclass(frozen=True, kw_only=True)
class Reconstructions(Evaluator):
    """Images of the data in the upper rows, an autoencoder's reconstructions in the lower.

    Attributes:
      count: of the images.
      every: steps between evaluations; 0 evaluates at the end alone.
      label: names its figures and images in the place of `name`.
    """

    name: ClassVar[str] = "reconstructions"
    has_figures: ClassVar[bool] = False
    count: Count = 16
    every: Natural = 0
    label: Label = None

    def check(self, spec: AnySpec, data: DataConfig) -> None:
        """Raise `UserError` for a model other than an autoencoder."""
        if not isinstance(spec, AutoencoderSpec):
            raise UserError(
                f"evaluator {self.prefix!r} needs an autoencoder but the recipe trains a "
                f"{type(spec).__name__}: leave the evaluator out."
            )

    def evaluate(self, context: EvalContext) -> Report:
        """Encode and decode images of the data."""
        self.check(context.spec, context.data)
        found = _images(context.data)
        images = np.stack([image for image, _ in zip(found, range(self.count), strict=False)])
        decoded = image_io.to_uint8(to_host(_reconstruct(context.spec)(context.params, images)))
        both = np.concatenate([images, decoded])
        return Report(images={"samples": image_io.grid(both, columns=8, scale=2)})


@functools.lru_cache(maxsize=2)
def _reconstruct(spec: Any) -> Any:
    """Return the jitted function (params, images) -> float images."""

    @jax.jit
    def reconstruct(params, images):
        model = bind_params(bind_build(spec), params)
        return model.decode(model.encode(from_uint8(images)).mode())

    return reconstruct


def _images(data: DataConfig) -> Iterator[UInt8[np.ndarray, "h w c"]]:
    """Yield the images of the records in their order, without unusable ones."""
    source, rng = image_source(data), np.random.default_rng(0)
    for i in range(len(source)):
        try:
            image = data.transforms(source[i], rng).image
        except RecordError:
            continue
        yield image
