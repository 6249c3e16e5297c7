"""FLOPs of an image follow from the solver, the guidance and the steps."""

import dataclasses
import re

import numpy as np
import pytest

from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.distributed.chips import CHIPS
from jaxdiff.io.images import save_png
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.pipelines import flops
from jaxdiff.pipelines.flops import SamplingSpeed, evaluation_times, sampling_flops
from jaxdiff.pipelines.resolve import CommandDefaults, resolve_settings
from jaxdiff.pipelines.settings import GenerationSettings
from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers import SOLVERS

EVALUATIONS = {"heun": 19, "plms": 11}  # of ten steps; of other solvers ten


@pytest.mark.parametrize("name", SOLVERS)
def test_the_evaluations_of_each_solver_are_counted(name):
    sampler = Sampler(solver=SOLVERS[name]()).resolve()
    times = evaluation_times(sampler, RectifiedFlow(), num_steps=10)
    assert len(times) == EVALUATIONS.get(name, 10)
    assert times[0] == 1
    assert all(0 < t <= 1 for t in times)


@pytest.fixture
def counted(tiny_spec):
    """`counted(steps=10, guidance=...)`: the evaluations of the network for an image of 32 x 32."""
    network = tiny_spec.denoiser.flops(height=32, width=32, text_length=16)

    def count(steps=10, first=0, **sampler) -> float:
        resolved = Sampler(**sampler).resolve()
        total = sampling_flops(tiny_spec, resolved, (32, 32), num_steps=steps, first=first)
        return (total - 2 * tiny_spec.conditioner.flops()) / network

    return count


def test_guided_steps_evaluate_the_network_twice(counted):
    assert counted() == pytest.approx(20)
    assert counted(guidance=Guidance(interval=(0.0, 0.55))) == pytest.approx(10 + 5)
    assert counted(solver=SOLVERS["heun"]()) == pytest.approx(38)


def test_unguided_steps_evaluate_it_once(tiny_spec):
    network = tiny_spec.denoiser.flops(height=32, width=32, text_length=16)
    unguided = Sampler(guidance_scale=1.0).resolve()
    total = sampling_flops(tiny_spec, unguided, (32, 32), num_steps=10)
    assert total == pytest.approx(10 * network + tiny_spec.conditioner.flops())


def test_other_steps_compile_nothing(compilations):
    sampler = Sampler(num_steps=7).resolve()
    evaluation_times(sampler, RectifiedFlow(), num_steps=7)
    compilations.clear()
    times = evaluation_times(sampler, RectifiedFlow(), num_steps=9, first=3)
    assert len(times) == 6
    assert times[0] == pytest.approx(6 / 9)
    assert not compilations


def test_only_steps_that_are_taken_count(counted):
    assert counted(first=4) == pytest.approx(12)
    assert counted(guidance=Guidance(cfg_zero_star=CFGZeroStar(zero_steps=1))) == pytest.approx(18)
    assert counted(resample_steps=3) == pytest.approx(60)


def test_an_autoencoder_decodes_once(tiny_spec):

    autoencoder = TinyAutoencoderConfig()
    denoiser = dataclasses.replace(tiny_spec.denoiser, channels=4, patch_size=2)
    spec = dataclasses.replace(tiny_spec, autoencoder=autoencoder, denoiser=denoiser)
    sampler = Sampler().resolve()
    few, many = (sampling_flops(spec, sampler, (64, 32), num_steps=n) for n in (1, 2))
    fixed = 2 * few - many
    expected = autoencoder.decode_flops(height=32, width=64) + 2 * spec.conditioner.flops()
    assert fixed == pytest.approx(expected)


@pytest.fixture
def speed(pipeline, monkeypatch):
    """`speed(*settings)`: the text after a call of 4 s that compiles and one of 2 s."""

    def text(chip=None, **settings) -> str:
        monkeypatch.setattr(flops, "find_chip", lambda _: chip)
        found = SamplingSpeed(pipeline)
        asked = GenerationSettings(prompt="a pea", **settings)
        one = resolve_settings(asked, pipeline, CommandDefaults())
        assert found.text() == ""
        found.add([one], 4.0)
        assert found.text() == ""
        found.add([one] * 8, 2.0)
        return found.text()

    return text


def test_the_speed_leaves_out_the_call_that_compiles(speed):
    assert speed() == "; 4 images/s without compilation"


def test_the_utilisation_is_that_of_the_chip(speed, pipeline):
    chip = dataclasses.replace(CHIPS[0], flops=1e10)
    found = re.fullmatch(r"; 4 images/s without compilation, MFU (.*)%", speed(chip))
    assert found is not None
    spec = pipeline.spec
    one = sampling_flops(spec, spec.sampler.resolve(), (32, 32), num_steps=3)
    expected = 4 * one / (1e10 * len(pipeline.devices))
    assert float(found[1]) == pytest.approx(100 * expected, abs=0.06)


def test_what_is_not_counted_has_no_utilisation(speed, tmp_path):
    chip = dataclasses.replace(CHIPS[0], flops=1e10)
    assert "MFU" not in speed(chip, best_of=2)
    image = tmp_path / "image.png"
    save_png(image, np.zeros((32, 32, 3), np.uint8))
    assert "MFU" in speed(chip, init_image=image)
    assert "MFU" not in speed(chip, init_image=image, variation=0.5)


def test_the_utilisation_is_that_of_the_scale(speed):
    chip = dataclasses.replace(CHIPS[0], flops=1e10)
    once, twice = (
        float(speed(chip, guidance_scale=scale).rpartition(" ")[2].rstrip("%"))
        for scale in (1.0, 2.0)
    )
    assert once == pytest.approx(twice / 2, rel=0.01)
