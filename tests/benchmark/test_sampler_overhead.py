import jax
import pytest

from jaxdiff.benchmark.sampler_overhead import Overhead, measure
from jaxdiff.pipelines.pipeline import Pipeline, load


def test_a_step_and_a_bare_call_are_timed(tiny_bundle):
    pipeline = Pipeline(tiny_bundle, devices=jax.devices()[:1])
    found = measure(pipeline, 32, steps=(2, 60), repeats=2)
    assert (found.size, found.batch) == (32, 4)
    assert 0 < found.bare < 1
    assert 0 < found.sampler < 1


def test_the_share_is_what_the_sampler_takes_longer():
    assert Overhead(size=64, batch=4, bare=0.02, sampler=0.021).share == pytest.approx(0.05)


@pytest.mark.nightly
@pytest.mark.parametrize("size", [64, 128])
def test_a_step_takes_at_most_a_tenth_longer_than_the_network(size):
    pipeline = load(devices=jax.devices()[:1])
    assert measure(pipeline, size, steps=(4, 24), repeats=7).share < 0.1
