import dataclasses

import pytest

from jaxdiff.benchmark.sample import time_sampling
from jaxdiff.errors import UserError


def test_sampling_is_timed_beside_its_network(tiny_recipe, tiny_bundle):
    config = dataclasses.replace(tiny_recipe(), sampling=tiny_bundle.config.sampling)
    found = time_sampling(config, warmup=0, repeats=3, batch_size=2)
    assert len(found.seconds) == 3
    assert found.images == 2
    metrics = found.metrics
    assert metrics["num_steps"] == 3
    assert metrics["compile_s"] > 0
    assert metrics["network_alone_s"] > 0
    assert metrics["step_over_network"] == metrics["step_s"] / metrics["network_alone_s"]


def test_a_single_step_is_refused(tiny_recipe):
    settings = dataclasses.replace(tiny_recipe().sampling, num_steps=1)
    config = dataclasses.replace(tiny_recipe(), sampling=settings)
    with pytest.raises(UserError, match="expected at least 2"):
        time_sampling(config, warmup=0, repeats=3, batch_size=1)
