"""Feature networks: the names of their figures."""

from jaxdiff.evaluation.features import dinov2_network
from jaxdiff.evaluation.self_test import fixed_dinov2
from jaxdiff.models.image_encoders.dinov2 import Dinov2Config


def test_figures_of_dinov2_are_named_after_its_size():
    config, params = fixed_dinov2()
    small = dinov2_network(config, params)
    assert small.name_of("frechet") == "fd_dinov2_32x2"
    assert small.name_of("precision") == "precision_dinov2_32x2"
    assert dinov2_network(Dinov2Config(), params).name_of("frechet") == "fd_dinov2"
