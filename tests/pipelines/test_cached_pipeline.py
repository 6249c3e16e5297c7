"""Feature caching in the sampling loop of whole models."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.unet_small import UNetConfig
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.sampling.feature_cache import FirstBlockCache, TaylorSeer
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import Heun

PROMPTS = ["a small red pea", "a green tomato with a stem", "a pea"]
CACHES = [TaylorSeer(interval=2, warmup=2), FirstBlockCache(threshold=0.6)]
COMMON = {"seeds": [5, 6, 7], "num_steps": 8, "output": "float", "batch_size": 3}


def images(pipe, cache=None, prompts=PROMPTS, *, guidance=None, solver=None, **settings):
    sampler = Sampler(cache=cache, solver=solver)
    return pipe(prompts, sampler=sampler, guidance=guidance, **(COMMON | settings))


@pytest.mark.parametrize("cache", CACHES, ids=repr)
def test_an_image_depends_on_no_other(pipeline, cache):
    together = images(pipeline, cache)
    assert np.abs(together - images(pipeline)).max() > 1e-3  # something was reused
    for i, prompt in enumerate(PROMPTS):
        alone = images(pipeline, cache, [prompt], seeds=[5 + i])
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.parametrize(
    ("always", "interval", "solver"),
    [
        (TaylorSeer(interval=3, warmup=8), (0.0, 1.0), Heun()),
        pytest.param(FirstBlockCache(threshold=1e-9), (0.2, 0.8), None, marks=pytest.mark.nightly),
    ],
)
def test_a_cache_that_always_evaluates_is_exact(pipeline, always, interval, solver):
    settings = {"guidance": Guidance(interval=interval), "solver": solver}
    exact = images(pipeline, **settings)
    np.testing.assert_allclose(images(pipeline, always, **settings), exact, atol=1e-4)
    reused = images(pipeline, CACHES[0], **settings)
    assert np.isfinite(reused).all()
    assert np.abs(reused - exact).max() > 1e-3


def test_previews_change_no_bits_and_steps_do_not_recompile(pipeline, compilations):
    plain = images(pipeline, CACHES[0])
    seen = []
    watched = images(pipeline, CACHES[0], callback=lambda step, x: seen.append(step))
    np.testing.assert_array_equal(watched, plain)
    assert seen == list(range(1, 9))
    compilations.clear()
    images(pipeline, CACHES[0], num_steps=5, guidance_scale=3.0)
    assert not compilations


@pytest.mark.slow
def test_a_unet_is_cached(tiny_bundle):
    denoiser = UNetConfig(
        channels=3, patch_size=4, widths=(16, 32), blocks=1, attention=(False, True), heads=2,
        groups=4, text_width=16, pooled_width=16,
    )  # fmt: skip
    spec = dataclasses.replace(tiny_bundle.spec, denoiser=denoiser)
    rng = np.random.default_rng(0)
    params = {
        **tiny_bundle.params,
        "denoiser": jax.tree.map(
            lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32),
            spec.abstract_params()["denoiser"],
        ),
    }
    pipe = Pipeline(tiny_bundle._replace(spec=spec, params=params))
    exact = images(pipe)
    always = images(pipe, FirstBlockCache(threshold=1e-9))
    np.testing.assert_allclose(always, exact, atol=1e-4)
    assert np.abs(images(pipe, CACHES[0]) - exact).max() > 1e-3


def test_what_does_not_fit_is_refused(pipeline):
    for sampler, message in (
        (Sampler(cache=TaylorSeer(), resample_steps=2), "resample_steps is 2 with a cache"),
        (Sampler(cache=TaylorSeer(), wrap=(True, True)), "does not support windows: omit cache"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline(PROMPTS, sampler=sampler)
    assert Sampler(cache=TaylorSeer(interval=1)).resolve().cache is None
