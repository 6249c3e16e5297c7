import dataclasses

import pytest

from jaxdiff.benchmark import sample
from jaxdiff.errors import UserError


def test_drawing_is_timed_beside_its_network(tiny_recipe, tiny_bundle):
    config = dataclasses.replace(tiny_recipe(), sampling=tiny_bundle.config.sampling)
    found = sample.measure(config, warmup=0, repeats=3, batch_size=2)
    assert len(found.seconds) == 3
    assert found.images == 2
    figures = found.figures
    assert figures["num_steps"] == 3
    assert figures["compile_s"] > 0
    assert figures["network_alone_s"] > 0
    assert figures["step_over_network"] == figures["step_s"] / figures["network_alone_s"]


def test_one_step_cannot_be_told_from_what_surrounds_it(tiny_recipe):
    settings = dataclasses.replace(tiny_recipe().sampling, num_steps=1)
    config = dataclasses.replace(tiny_recipe(), sampling=settings)
    with pytest.raises(UserError, match="needs at least 2"):
        sample.measure(config, warmup=0, repeats=3, batch_size=1)
