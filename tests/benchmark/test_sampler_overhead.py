import dataclasses

import jax
import pytest

from jaxdiff.benchmark.sampler_overhead import Overhead, bare_network, sampler_overhead
from jaxdiff.benchmark.synthetic import random_bundle
from jaxdiff.models.denoisers.flux import FluxConfig
from jaxdiff.pipelines.load import load
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.sampling.guidance.guidance import Guidance


def test_a_step_and_a_bare_call_are_timed(tiny_bundle):
    pipeline = Pipeline(tiny_bundle, devices=jax.devices()[:1])
    found = sampler_overhead(pipeline, 32, steps=(2, 60), repeats=2)
    assert (found.size, found.batch) == (32, 4)
    assert 0 < found.bare < 1
    assert 0 < found.sampler < 1


@pytest.mark.parametrize(
    ("scale", "guidance", "rows"),
    [
        (3.0, Guidance(), 4),
        (1.0, Guidance(), 2),
        (1.0, Guidance(distilled=True), 2),
        (1.0, Guidance(distilled=True, true_cfg_scale=2.0), 4),
    ],
)
def test_the_bare_call_is_of_the_rows_of_a_step(tiny_bundle, scale, guidance, rows):
    spec = tiny_bundle.spec
    sampler = dataclasses.replace(spec.sampler, guidance_scale=scale, guidance=guidance)
    bundle = tiny_bundle._replace(spec=dataclasses.replace(spec, sampler=sampler))
    call = bare_network(Pipeline(bundle, devices=jax.devices()[:1]), 32, 2)
    assert call().shape == (rows, 32, 32, 3)


def test_a_network_that_reads_the_guidance_scale_is_called_with_it(tiny_recipe):
    config = tiny_recipe()
    network = FluxConfig(
        channels=3,
        patch_size=8,
        heads=1,
        head_width=8,
        double_depth=1,
        single_depth=1,
        text_width=16,
        rope_axes=(2, 2, 2, 2),
        guidance_embedding=True,
    )
    model = dataclasses.replace(config.task.model, denoiser=network)
    task = dataclasses.replace(config.task, model=model)
    bundle = random_bundle(dataclasses.replace(config, task=task))
    call = bare_network(Pipeline(bundle, devices=jax.devices()[:1]), 32, 2)
    assert call().shape == (2, 32, 32, 3)


def test_the_fraction_is_relative_to_the_bare_network():
    assert Overhead(size=64, batch=4, bare=0.02, sampler=0.021).fraction == pytest.approx(0.05)


@pytest.mark.nightly
@pytest.mark.parametrize("size", [64, 128])
def test_the_overhead_of_a_step_is_at_most_a_tenth(size):
    pipeline = load(devices=jax.devices()[:1])
    assert sampler_overhead(pipeline, size, steps=(4, 24), repeats=7).fraction < 0.1
