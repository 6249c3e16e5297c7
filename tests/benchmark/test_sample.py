import dataclasses
from statistics import median

import pytest

from jaxdiff.benchmark.sample import time_sampling
from jaxdiff.data.transforms import Transforms
from jaxdiff.errors import UserError
from jaxdiff.pipelines.flops import sampling_flops


def with_steps(config, num_steps):
    """The recipe with another number of steps."""
    sampler = dataclasses.replace(config.task.model.sampler, num_steps=num_steps)
    model = dataclasses.replace(config.task.model, sampler=sampler)
    return dataclasses.replace(config, task=dataclasses.replace(config.task, model=model))


def test_sampling_is_timed_beside_its_network(tiny_recipe, tmp_path):
    config = with_steps(tiny_recipe(), 3)
    other = dataclasses.replace(config.data, transforms=Transforms(size=16))  # than it samples
    config = dataclasses.replace(config, data=other)
    options = {"warmup": 0, "repeats": 3, "batch_size": 2, "peak_tflops": 0.5}
    found = time_sampling(config, trace=str(tmp_path), **options)
    assert len(found.seconds) == 3
    assert found.images == 2
    metrics = found.metrics
    assert metrics["num_steps"] == 3
    assert metrics["compile_s"] > 0
    assert metrics["network_alone_s"] > 0
    assert metrics["step_over_network"] == metrics["step_s"] / metrics["network_alone_s"]
    sampler = config.task.model.sampler.resolve()
    tflops = sampling_flops(config.task.model, sampler, (32, 32), num_steps=3) / 1e12
    assert metrics["model_tflops_per_image"] == tflops
    assert metrics["mfu"] == pytest.approx(2 * tflops / median(found.seconds) / 0.5)
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_a_single_step_is_refused(tiny_recipe):
    with pytest.raises(UserError, match="expected at least 2"):
        time_sampling(with_steps(tiny_recipe(), 1), warmup=0, repeats=3, batch_size=1)
