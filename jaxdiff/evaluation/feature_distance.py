"""Distances of generated images from a reference in the features of a network, such as FID."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from etils import epath

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Natural, Range
from jaxdiff.data.loader import DataConfig
from jaxdiff.errors import UserError
from jaxdiff.evaluation import distances
from jaxdiff.evaluation.distances import root_factor
from jaxdiff.evaluation.evaluator import (
    EvalContext,
    Evaluator,
    Goal,
    Label,
    Report,
    check_text_to_image,
    digest_of_texts,
    image_source,
    shortage_text,
)
from jaxdiff.evaluation.extraction import generated_features
from jaxdiff.evaluation.features import (
    AnyFeatures,
    ClipFeatures,
    FeatureNetwork,
    Features,
    Measure,
)
from jaxdiff.evaluation.image_sets import DataImages
from jaxdiff.evaluation.reference import Reference, open_reference
from jaxdiff.evaluation.statistics import Statistics, collect
from jaxdiff.pretrained.bundle import AnySpec

_FIGURES: dict[Measure, tuple[str, ...]] = {
    "frechet": ("frechet", "frechet_infinity"),
    "kernel": ("kernel",),
    "mmd": ("mmd",),
    "precision_recall": ("precision", "recall"),
}

UNBIASED = 50_000
"""Images from which on the Frechet distance is not extrapolated."""

SETTINGS: dict[str, dict[str, Any]] = {
    "kernel": {
        "subsets": distances.KERNEL_SUBSETS,
        "subset_size": distances.KERNEL_SUBSET_SIZE,
    },
    "mmd": {"sigma": distances.MMD_SIGMA},
    "precision": {"neighbours": distances.NEIGHBOURS, "most": distances.NEIGHBOUR_SAMPLES},
    "recall": {"neighbours": distances.NEIGHBOURS, "most": distances.NEIGHBOUR_SAMPLES},
}
"""Settings of measures; figures of other ones are not comparable."""


def measure(
    network: FeatureNetwork,
    ours: Statistics,
    theirs: Statistics,
    measures: Sequence[Measure] = (),
    *,
    few: bool = False,
) -> Report:
    """Return the distances of a set of images from a reference.

    Args:
      network: of both statistics' features.
      ours: of the images, with features.
      theirs: of the reference.
      measures: to compute; none computes those that the network is known for.
      few: whether to report a Frechet distance of at most 2 d images, for features of d numbers,
        which is too few to extrapolate.

    Raises:
      UserError: too few images; or a measure that needs the reference's features, which a file
        with moments alone lacks.
    """
    assert ours.features is not None
    reference = Reference(name=theirs.data, stored=theirs)
    found: dict[str, float] = {}
    for kind in check_measures(network, ours.count, reference, measures, few=few):
        if kind == "frechet":
            found |= _frechet(network, ours, theirs)
            continue
        assert theirs.features is not None
        if kind == "kernel":
            found["kernel"] = distances.kernel_distance(ours.features, theirs.features)
        elif kind == "mmd":
            found["mmd"] = distances.gaussian_mmd(ours.features, theirs.features)
        else:
            both = distances.precision_recall(ours.features, theirs.features)
            found |= dict(zip(("precision", "recall"), both, strict=True))
    common = {
        **network.provenance,
        "images": ours.count,
        "reference": theirs.fingerprint,
        "reference_images": theirs.count,
    }
    scalars = {network.name_of(name): value for name, value in found.items()}
    provenance = {network.name_of(name): common | SETTINGS.get(name, {}) for name in found}
    return Report(scalars=scalars, text=_table(scalars, ours, theirs), provenance=provenance)


def check_measures(
    network: FeatureNetwork,
    images: int,
    reference: Reference,
    measures: Sequence[Measure] = (),
    *,
    few: bool = False,
) -> tuple[Measure, ...]:
    """Return the measures to compute, which is known before any feature is.

    Args:
      network: of the features.
      images: number of images to compare with the reference.
      reference: the reference.
      measures: as for `measure`.
      few: as for `measure`.

    Raises:
      UserError: as `measure`.
    """
    wanted: tuple[Measure, ...] = tuple(measures) or network.usual
    if not reference.has_features:
        needing = [kind for kind in wanted if kind != "frechet"]
        wanted = ("frechet",) if "frechet" in wanted else ()
        if needing and (measures or not wanted):
            raise UserError(
                f"{reference.name} holds mean and covariance alone, and {needing[0]} needs "
                "features: expected images, or statistics of jaxdiff evaluate --reference; give "
                "them, or measure frechet alone."
            )
    least, enough = min(images, reference.count or images), 2 * network.width
    if "frechet" in wanted and least <= enough and not few:
        raise UserError(
            f"{network.name_of('frechet')} of {least} images says little, as its bias grows with "
            f"1 / images and {network.width} numbers of features need more to extrapolate it: "
            f"expected more than {enough}; compare more images (samples, --samples), or allow few "
            "ones (few, --few)."
        )
    return wanted


def _frechet(network: FeatureNetwork, ours: Statistics, theirs: Statistics) -> dict[str, float]:
    """Return the Frechet distance, and its extrapolation for less than `UNBIASED` images."""
    root = root_factor(theirs.moments.covariance)
    found = {"frechet": distances.frechet(ours.moments, theirs.moments, root)}
    if 2 * network.width < ours.count < UNBIASED:
        assert ours.features is not None
        end = distances.frechet_infinity(ours.features, theirs.moments, root)
        found["frechet_infinity"] = end
    return found


def _table(scalars: dict[str, float], ours: Statistics, theirs: Statistics) -> str:
    lines = [f"{name:<40}{value:>12.5g}" for name, value in scalars.items()]
    return "\n".join(
        [*lines, f"{ours.data}: {ours.count}; reference {theirs.data}: {theirs.count or 'unknown'}"]
    )


@checked
@dataclass(frozen=True, kw_only=True)
class FeatureDistance(Evaluator):
    """Distances of generated images from a reference in the features of a network.

    Prompts are captions of records spread over the data; image i has seed i.

    Attributes:
      network: of the features. With the FID Inception the figures are `fid`, `kid`, `precision` and
        `recall`; those of another network have its name.
      reference: statistics of `jaxdiff evaluate --reference`, an .npz file of ADM or pytorch-fid,
        or a folder of images; None takes the images whose captions are the prompts.
      samples: images; published figures are of 50,000.
      measures: to compute; none computes those that the network is known for.
      few: whether to report a Frechet distance of at most 2 d images, for features of d numbers,
        which is too few to extrapolate.
      every: steps between evaluations; 0 evaluates at the end alone.
      label: names its figures and images in the place of `name`.

    Raises:
      UserError: fewer than two samples.
    """

    name: ClassVar[str] = "features"
    goal: ClassVar[Goal] = "min"
    network: AnyFeatures | Features = field(default_factory=ClipFeatures)
    reference: str | None = None
    samples: Annotated[int, Range(2)] = 5000
    measures: tuple[Measure, ...] = ()
    few: bool = False
    every: Natural = 0
    label: Label = None

    def goal_of(self, scalar: str) -> Goal:
        """Return "max" for precision and recall, "min" for distances."""
        return "max" if scalar.startswith(("precision", "recall")) else self.goal

    def check(self, spec: AnySpec, data: DataConfig) -> None:
        """Raise `UserError` for a model or data without text, or before an impossible comparison.

        The network is loaded, and the reference is opened.
        """
        self._check_data(spec, data)
        network, images = self.network.load(), DataImages(data, self.samples)
        reference = self._reference(images)
        reference.check(network)
        check_measures(network, len(images), reference, self.measures, few=self.few)

    def figure_names(self) -> frozenset[str]:
        """Return the names of the figures of its measures; the network is loaded."""
        network = self.network.load()
        found = (name for kind in self.measures or network.usual for name in _FIGURES[kind])
        return frozenset(map(network.name_of, found))

    def fingerprints(self, data: DataConfig) -> Mapping[str, str]:
        """Return those of the network, of the records and of the reference."""
        images = DataImages(data, self.samples)
        return {
            **self.network.load().provenance,
            "records": images.fingerprint,
            "reference": self._reference(images).fingerprint,
        }

    def _check_data(self, spec: AnySpec, data: DataConfig) -> None:
        check_text_to_image(spec, self)
        if image_source(data) is None:
            raise UserError(
                f"evaluator {self.prefix!r} needs captions but data.source is cached latents: set "
                "data.source.of to the original data, or leave the evaluator out."
            )

    def evaluate(self, context: EvalContext) -> Report:
        """Generate images, and compare their features with those of the reference."""
        self._check_data(context.spec, context.data)
        network, images = self.network.load(), DataImages(context.data, self.samples)
        theirs = self._statistics(network, images, context.parts)
        prompts = images.captions()
        if len(prompts) < 2:
            raise UserError(
                f"evaluator {self.prefix!r} found {len(prompts)} usable records with a caption: "
                "expected at least 2; repair the data, or leave the evaluator out."
            )
        parts = generated_features(context, network, prompts)
        ours = collect(parts, network.provenance, "generated images", len(prompts))
        report = measure(network, ours, theirs, self.measures, few=self.few)
        texts = {"prompts": digest_of_texts(prompts)}
        about = {name: {**known, **texts} for name, known in report.provenance.items()}
        text = report.text + shortage_text(len(prompts), self.samples)
        return report._replace(provenance=about, text=text)

    def _reference(self, images: DataImages) -> Reference:
        if self.reference is None:
            return Reference(name=images.name, images=images)
        return open_reference(self.reference)

    def _statistics(
        self, network: FeatureNetwork, images: DataImages, folder: epath.Path | None
    ) -> Statistics:
        """Return the statistics of the reference, computed once for all evaluations of a run."""
        key = str(network.provenance), self.reference or images.fingerprint
        if key not in _references:
            if len(_references) >= _MOST_REFERENCES:
                del _references[next(iter(_references))]
            _references[key] = self._reference(images).statistics(network, folder)
        return _references[key]


_MOST_REFERENCES = 4
_references: dict[tuple[str, str], Statistics] = {}  # the latest, by network and images
