import dataclasses

import pytest

from jaxdiff.benchmark import sample
from jaxdiff.errors import UserError


def test_sampling_is_timed_beside_its_network(tiny_recipe):
    found = sample.measure(tiny_recipe(), warmup=0, repeats=3, batch_size=2)
    assert len(found.seconds) == 3
    assert found.images == 2
    figures = found.figures
    assert figures["num_steps"] == 3
    assert figures["compile_s"] > 0
    assert figures["network_alone_s"] > 0
    assert figures["step_over_network"] == figures["step_s"] / figures["network_alone_s"]


def test_one_step_cannot_be_timed_apart_from_what_surrounds_it(tiny_recipe):
    config = tiny_recipe()
    model = config.task.model
    sampler = dataclasses.replace(model.sampler, num_steps=1)
    task = dataclasses.replace(config.task, model=dataclasses.replace(model, sampler=sampler))
    config = dataclasses.replace(config, task=task)
    with pytest.raises(UserError, match="needs at least 2"):
        sample.measure(config, warmup=0, repeats=3, batch_size=1)
