import dataclasses

import pytest

from jaxdiff.benchmark.sample import time_sampling
from jaxdiff.errors import UserError


def with_steps(config, num_steps):
    """The recipe with another number of steps."""
    sampler = dataclasses.replace(config.task.model.sampler, num_steps=num_steps)
    model = dataclasses.replace(config.task.model, sampler=sampler)
    return dataclasses.replace(config, task=dataclasses.replace(config.task, model=model))


def test_sampling_is_timed_beside_its_network(tiny_recipe):
    found = time_sampling(with_steps(tiny_recipe(), 3), warmup=0, repeats=3, batch_size=2)
    assert len(found.seconds) == 3
    assert found.images == 2
    metrics = found.metrics
    assert metrics["num_steps"] == 3
    assert metrics["compile_s"] > 0
    assert metrics["network_alone_s"] > 0
    assert metrics["step_over_network"] == metrics["step_s"] / metrics["network_alone_s"]


def test_a_single_step_is_refused(tiny_recipe):
    with pytest.raises(UserError, match="expected at least 2"):
        time_sampling(with_steps(tiny_recipe(), 1), warmup=0, repeats=3, batch_size=1)
