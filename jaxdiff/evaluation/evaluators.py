"""All evaluators that a recipe may hold."""

from jaxdiff.evaluation.clip_score import ClipScore
from jaxdiff.evaluation.evaluator import Evaluator
from jaxdiff.evaluation.feature_distance import FeatureDistance
from jaxdiff.evaluation.held_out import HeldOutLoss
from jaxdiff.evaluation.openmoji import OpenMojiAccuracy
from jaxdiff.evaluation.produce import ProduceAccuracy
from jaxdiff.evaluation.samples import Reconstructions, SampleGrid

AnyEvaluator = (
    SampleGrid
    | Reconstructions
    | ProduceAccuracy
    | OpenMojiAccuracy
    | ClipScore
    | FeatureDistance
    | HeldOutLoss
    | Evaluator
)
