import jax
import pytest

from jaxdiff.benchmark.sampler_overhead import Overhead, sampler_overhead
from jaxdiff.pipelines.load import load
from jaxdiff.pipelines.pipeline import Pipeline


def test_a_step_and_a_bare_call_are_timed(tiny_bundle):
    pipeline = Pipeline(tiny_bundle, devices=jax.devices()[:1])
    found = sampler_overhead(pipeline, 32, steps=(2, 60), repeats=2)
    assert (found.size, found.batch) == (32, 4)
    assert 0 < found.bare < 1
    assert 0 < found.sampler < 1


def test_the_fraction_is_relative_to_the_bare_network():
    assert Overhead(size=64, batch=4, bare=0.02, sampler=0.021).fraction == pytest.approx(0.05)


@pytest.mark.nightly
@pytest.mark.parametrize("size", [64, 128])
def test_the_overhead_of_a_step_is_at_most_a_tenth(size):
    pipeline = load(devices=jax.devices()[:1])
    assert sampler_overhead(pipeline, size, steps=(4, 24), repeats=7).fraction < 0.1
