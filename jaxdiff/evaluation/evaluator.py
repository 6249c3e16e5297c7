"""The interface of evaluators, their inputs and their reports.

An evaluator is a frozen dataclass in a recipe. Training calls it every `every` steps and at the
end; `jaxdiff evaluate` calls the same object.
"""

import abc
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import UInt8

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, unexpected
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.cached_latents import CachedLatents
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.distributed.multihost import gather_rows, rows_of_host
from jaxdiff.errors import UserError
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.rerank import best_of_n
from jaxdiff.pretrained.bundle import AnySpec, Bundle
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance

Goal = Literal["min", "max"]
"""Which value of a scalar is best."""


@dataclass(frozen=True)
class FigureName:
    """A name that metrics and files may have."""

    def check(self, name: str, value: Any, kind: Any) -> str:
        """Raise `UserError` for other characters than letters, digits, `_`, `-` and `.`."""
        if not isinstance(value, str) or not re.fullmatch(r"[\w.-]+", value):
            raise unexpected(name, value, "a name of letters, digits, _, - and .")
        return value


Label = Annotated[str | None, FigureName()]

T = TypeVar("T")


class Losses(NamedTuple):
    """Metrics of a task.

    Attributes:
      metrics: means over records, by name.
      provenance: what they depend on.
    """

    metrics: Mapping[str, np.ndarray]
    provenance: Mapping[str, Any]


class Report(NamedTuple):
    """The result of an evaluator.

    Attributes:
      scalars: figures by name, for metrics.
      images: uint8 [h, w, 3] by name.
      text: the figures as a table, for people; "" for none.
      provenance: what each figure depends on; figures of other ones are not comparable.
    """

    scalars: Mapping[str, float] = {}
    images: Mapping[str, UInt8[np.ndarray, "h w 3"]] = {}
    text: str = ""
    provenance: Mapping[str, Mapping[str, Any]] = {}


@checked
@dataclass(frozen=True, kw_only=True)
class Generation:
    """How evaluators generate images, where it differs from the model's own settings.

    Attributes:
      best_of: images generated for each prompt; a CLIP selects the best.
      clip_model: that CLIP.
      arguments: further arguments of the pipeline.

    Raises:
      UserError: best_of below 1.
    """

    best_of: Count = 1
    clip_model: str = ClipGuidance.model
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def used_clip(self) -> str | None:
        """The CLIP that ranks images or guides them; None for none."""
        if self.best_of > 1:
            return self.clip_model
        guidance = self.arguments.get("guidance")
        return guidance.clip.model if guidance and guidance.clip else None


@dataclass(frozen=True)
class EvalContext:
    """Inputs of an evaluator.

    Attributes:
      step: of the run; 0 outside of runs.
      spec: of the model.
      params: of the model, its moving average.
      tokenizers: of its text encoders.
      data: of the recipe.
      generation: how images are generated.
      mesh: of devices that share the model, as they train it; None samples on those of this host.
      loss: `loss(samples)` computes the metrics of the recipe's task, means over as many held-out
        records; None where there is no such task.
      parts: folder for results in progress, which a later evaluation reads; None keeps none.
    """

    step: int
    spec: AnySpec
    params: Any
    tokenizers: Mapping[str, Any]
    data: DataConfig
    generation: Generation = Generation()
    mesh: Mesh | None = None
    loss: Callable[[int], Losses] | None = None
    parts: epath.Path | None = None

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        """The model as a pipeline, whose weights stay on the devices that train them.

        Text encoders that training keeps on the host stay there too.
        """
        bundle = Bundle(self.spec, self.params, dict(self.tokenizers))
        if self.mesh is None:
            return Pipeline(bundle)
        text = jax.tree.leaves(self.params.get("text_encoders", {}))
        on_host = bool(text) and all(isinstance(leaf, np.ndarray) for leaf in text)
        sizes = dict(self.mesh.shape)
        # XLA cannot sample with images split over data, fsdp and context at once.
        sizes |= {"fsdp": sizes["fsdp"] * sizes["context"], "context": 1}
        devices = list(self.mesh.devices.flat)
        return Pipeline(bundle, devices=devices, mesh=MeshConfig(**sizes), offload_text=on_host)

    def generate(self, prompts: Sequence[str], first: int = 0) -> UInt8[np.ndarray, "n h w 3"]:
        """Generate an image for each prompt.

        Image i has seed `first` + i; or it is the best of n, whose first has seed n times that.
        Where each host has the model, it generates its share, and all return all images.
        """
        if self.mesh is not None:
            return self._sample(prompts, first)
        return gather_rows(self.generate_share(prompts, first), len(prompts))

    def generate_share(
        self, prompts: Sequence[str], first: int = 0
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Generate the images of `generate`, and return this host's share, `rows_of_host`."""
        rows = rows_of_host(len(prompts))
        if self.mesh is not None:  # over hosts, which sample together
            return self._sample(prompts, first)[rows]
        if not prompts[rows]:  # fewer prompts than hosts
            assert isinstance(self.spec, TextToImage)
            return np.zeros((0, self.spec.image_size, self.spec.image_size, 3), np.uint8)
        return self._sample(prompts[rows], first + rows.start)

    def _sample(self, prompts: Sequence[str], first: int) -> UInt8[np.ndarray, "n h w 3"]:
        """Sample on all devices of the context."""
        how, count = self.generation, self.generation.best_of
        arguments = dict(how.arguments)
        if first:
            arguments["seeds"] = [count * (first + i) for i in range(len(prompts))]
        if count == 1:
            return self.pipeline(prompts, **arguments)
        return best_of_n(self.pipeline, prompts, n=count, clip=how.clip_model, **arguments).images


class Evaluator(abc.ABC):
    """Interface of evaluators; one's own is a frozen dataclass that inherits it.

    Attributes:
      name: of its figures in metrics, for a kind of evaluator.
      has_figures: whether it reports scalars; `jaxdiff evaluate` leaves out those of images alone.
      generates: whether its figures depend on how images are sampled, which a sweep varies.
      goal: which values of its scalars are best.
      every: steps from one evaluation to the next; 0 evaluates at the end alone.
      label: names its figures in the place of `name`, for a second evaluator of a kind.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # of those that inherit it

    name: ClassVar[str] = "evaluator"
    has_figures: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    goal: ClassVar[Goal] = "max"
    every: int = 0
    label: str | None = None

    @property
    def prefix(self) -> str:
        """What the names of its figures and images begin with, before a slash."""
        return self.label or self.name

    @abc.abstractmethod
    def evaluate(self, context: EvalContext) -> Report:
        """Evaluate a model."""

    def goal_of(self, scalar: str) -> Goal:
        """Return which value of one of its scalars is best; by default `goal` for all."""
        return self.goal

    def figure_names(self) -> frozenset[str] | None:
        """Return the names of all scalars that it can report; None where they are not known."""
        return None

    def fingerprints(self, data: DataConfig) -> Mapping[str, str]:
        """Return what identifies the networks and images that figures depend on, by name.

        Saved figures of other ones are measured again.
        """
        return {}

    def check(self, spec: AnySpec, data: DataConfig) -> None:  # noqa: B027 - may do nothing
        """Raise `UserError` for a model or data that cannot be evaluated, before any training."""


def check_evaluators(evaluators: Sequence[Evaluator], spec: AnySpec, data: DataConfig) -> None:
    """Check evaluators before any of them runs.

    Raises:
      UserError: two have one name, or one does not fit the model or the data.
    """
    check_prefixes(evaluators)
    for evaluator in evaluators:
        evaluator.check(spec, data)


def check_prefixes(evaluators: Sequence[Evaluator]) -> None:
    """Raise `UserError` for evaluators whose figures would overwrite each other's."""
    names = [evaluator.prefix for evaluator in evaluators]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"evaluators has {len(repeated)} of the name {repeated[0]!r}, whose figures would "
            "overwrite each other: expected different names; set `label` of all but one."
        )


def with_samples(evaluator: Evaluator, samples: int | None) -> Evaluator:
    """Return an evaluator with another number of samples, if it counts any; None leaves its own."""
    if samples is None or not hasattr(evaluator, "samples"):
        return evaluator
    changes: dict[str, Any] = {"samples": samples}
    return dataclasses.replace(evaluator, **changes)  # type: ignore[type-var]


def digest_of_texts(texts: Sequence[str]) -> str:
    """Return SHA-256, in hex, of texts in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def shortage_text(images: int, samples: int) -> str:
    """Return why there are fewer images than `samples`, for people to read; "" where not."""
    return f" (too few usable records for {samples} samples)" * (images < samples)


def image_source(data: DataConfig) -> Any:
    """Return the source of images; for cached latents, that of the original images."""
    source = data.source
    return source.of if isinstance(source, CachedLatents) else source


def check_text_to_image(spec: AnySpec, evaluator: Evaluator) -> TextToImage:
    """Return the specification if it is a text-to-image model's; else raise `UserError`."""
    if not isinstance(spec, TextToImage):
        raise UserError(
            f"evaluator {evaluator.prefix!r} needs a text-to-image model but the recipe trains a "
            f"{type(spec).__name__}: leave the evaluator out."
        )
    return spec


def check_drawings(
    spec: AnySpec, data: DataConfig, evaluator: Evaluator, kind: type[T], drawings: str
) -> T:
    """Return the source of the data if it is of a kind and of the model's size.

    Args:
      spec: of the model.
      data: of the recipe.
      evaluator: that compares images with the source's drawings.
      kind: of the source.
      drawings: what they are, for the message.

    Raises:
      UserError: the model, the source or its size is another.
    """
    size, source = check_text_to_image(spec, evaluator).image_size, image_source(data)
    if not isinstance(source, kind) or size != getattr(source, "size", None):
        raise UserError(
            f"evaluator {evaluator.prefix!r} compares images with {drawings}: expected data.source "
            f"to be {kind.__name__}, of the size of the model's images; leave the evaluator out."
        )
    return source


Columns = Mapping[str, Mapping[str, float]]  # {"score": {attribute: fraction}, "ceiling": ...}


def table(columns_of: Mapping[str, Columns], prompts: Mapping[str, Sequence[str]]) -> Report:
    """Report fractions of several sets of prompts by attribute and column.

    A scalar is named SET/ATTRIBUTE for the column "score", and SET/ATTRIBUTE/COLUMN for others.

    Args:
      columns_of: the fractions of each set.
      prompts: of each set, an image each.
    """
    scalars: dict[str, float] = {}
    provenance: dict[str, dict[str, Any]] = {}
    lines = []
    for name, columns in columns_of.items():
        about = {"images": len(prompts[name]), "prompts": digest_of_texts(prompts[name])}
        lines.append(f"{name:<40}" + "".join(f"{column:>9}" for column in columns))
        for attribute in columns["score"]:
            row = {column: values[attribute] for column, values in columns.items()}
            lines.append(f"  {attribute:<38}" + "".join(f"{x:>9.1%}" for x in row.values()))
            for column, value in row.items():
                end = "" if column == "score" else f"/{column}"
                scalars[f"{name}/{attribute}{end}"] = value
                provenance[f"{name}/{attribute}{end}"] = about
    return Report(scalars=scalars, text="\n".join(lines), provenance=provenance)
