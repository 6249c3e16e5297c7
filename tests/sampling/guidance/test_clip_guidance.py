"""CLIP guidance on data with a known posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.errors import UserError
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance, clip_views, with_clip_guidance
from jaxdiff.sampling.loop import noise_from_seeds, sample
from jaxdiff.sampling.solver import stateless
from jaxdiff.sampling.solvers_ode import DDIM

SEEDS = jnp.arange(512, dtype=jnp.uint32)
NOISE = noise_from_seeds(SEEDS, (1, 1, 2))
GOAL = jnp.array([1.5, -1.0])


def denoiser_of(schedule):
    """Of independent data of unit variance: E[x0 | x_t] = alpha x_t / (alpha^2 + sigma^2)."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * x / (alpha**2 + sigma**2)

    return denoise


def steered(schedule, match, scale, **arguments):
    """Return the guided denoiser as a function (x, t) -> x0."""
    denoiser = stateless(denoiser_of(schedule))
    denoiser = with_clip_guidance(denoiser, match, schedule, scale, **arguments)
    return lambda x, t: denoiser.denoise(x, t, ())[0]


def match(x0, t):
    """A scorer whose posterior is known: each value is pulled to the goal."""
    return -0.5 * jnp.sum((x0 - GOAL) ** 2, axis=(1, 2, 3))


@jax.jit
def images(scale):
    schedule = RectifiedFlow()
    guided = steered(schedule, match, scale)
    return sample(stateless(guided), DDIM(), schedule, TimeGrid(), 40, NOISE, SEEDS).images[:, 0, 0]


def test_the_match_rises_with_the_scale():
    scores = [float(jnp.mean(match(images(jnp.float32(s))[:, None, None], 0.0))) for s in (0, 1, 3)]
    assert scores[0] < scores[1] < scores[2]
    np.testing.assert_allclose(images(jnp.float32(0)).mean(0), 0, atol=0.15)
    pulled = images(jnp.float32(3)).mean(0)
    assert np.all(np.abs(pulled - GOAL) < np.abs(GOAL) / 2)


def test_a_step_is_the_gradient_by_the_variance_that_is_left():
    schedule, t = Cosine(), jnp.float32(0.6)
    x, alpha, sigma = NOISE[:3], schedule.alpha(t), schedule.sigma(t)
    plain = denoiser_of(schedule)(x, t)
    found = steered(schedule, match, jnp.float32(0.5))(x, t)
    left = sigma**2 / (alpha**2 + sigma**2)
    np.testing.assert_allclose(found, plain + 0.5 * left * (GOAL - plain), atol=1e-5)


def test_outside_the_interval_clip_is_not_evaluated():
    evaluated = []

    def seen(x0, t):
        jax.debug.callback(lambda: evaluated.append(1))
        return match(x0, t)

    schedule = RectifiedFlow()
    scale, interval = jnp.float32(1), (0.3, 0.7)
    guided = jax.jit(steered(schedule, seen, scale, interval=interval))
    plain = jax.jit(denoiser_of(schedule))
    for t, inside in ((0.2, False), (0.5, True), (0.8, False)):
        evaluated.clear()
        t = jnp.float32(t)
        same = np.allclose(guided(NOISE, t), plain(NOISE, t), atol=1e-6)
        jax.effects_barrier()
        assert (same, bool(evaluated)) == (not inside, inside)


def test_clip_sees_the_whole_or_the_same_cut_outs_of_every_image():
    ramp = jnp.broadcast_to(jnp.linspace(-1, 1, 24)[None, None, :, None], (2, 16, 24, 3))
    assert clip_views(ramp, 8, 0, jnp.float32(0.5)).shape == (2, 8, 8, 3)
    square = ramp[:, :, :16]
    np.testing.assert_array_equal(clip_views(square, 16, 0, jnp.float32(0.5)), square)
    cuts = clip_views(ramp, 8, 3, jnp.float32(0.5))
    assert cuts.shape == (6, 8, 8, 3)
    np.testing.assert_allclose(cuts[0::2], cuts[1::2], atol=1e-6)
    # A part of the ramp, as steep as it is large, and inside the picture.
    for cut in cuts[::2]:
        slope = float(cut[4, 6, 0] - cut[4, 1, 0]) / 5 * 8 / (2 / 23)
        assert 0.5 * 16 * 0.9 < slope < 16 * 1.1
        assert -1.01 <= float(cut.min()) <= float(cut.max()) <= 1.01
    assert not np.allclose(cuts[0], cuts[2])
    assert not np.allclose(cuts, clip_views(ramp, 8, 3, jnp.float32(0.4)))


@pytest.mark.parametrize("wrong", [{"scale": -1.0}, {"interval": (0.6, 0.4)}, {"cutouts": -1}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=r"ClipGuidance.* is .*: expected"):
        ClipGuidance(**wrong)
