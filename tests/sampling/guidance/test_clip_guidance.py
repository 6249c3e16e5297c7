"""Guidance by a second model, on data of which all is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.errors import UserError
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance, look, steered
from jaxdiff.sampling.loop import noise_from_seeds, sample
from jaxdiff.sampling.solvers_ode import DDIM

SEEDS = jnp.arange(512, dtype=jnp.uint32)
NOISE = noise_from_seeds(SEEDS, (1, 1, 2))
GOAL = jnp.array([1.5, -1.0])


def denoiser(schedule):
    """Of independent data of unit variance: E[x0 | x_t] = alpha x_t / (alpha^2 + sigma^2)."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * x / (alpha**2 + sigma**2)

    return denoise


def match(x0, t):
    """A scorer whose posterior is known: each value is pulled to the goal."""
    return -0.5 * jnp.sum((x0 - GOAL) ** 2, axis=(1, 2, 3))


@jax.jit
def draw(scale):
    schedule = RectifiedFlow()
    guided = steered(denoiser(schedule), match, schedule, scale)
    return sample(guided, DDIM(), schedule, TimeGrid(), 40, NOISE, SEEDS).images[:, 0, 0]


def test_the_match_rises_with_the_scale():
    scores = [float(jnp.mean(match(draw(jnp.float32(s))[:, None, None], 0.0))) for s in (0, 1, 3)]
    assert scores[0] < scores[1] < scores[2]
    np.testing.assert_allclose(draw(jnp.float32(0)).mean(0), 0, atol=0.15)
    pulled = draw(jnp.float32(3)).mean(0)
    assert np.all(np.abs(pulled - GOAL) < np.abs(GOAL) / 2)


def test_a_step_is_the_gradient_by_the_variance_that_is_left():
    schedule, t = Cosine(), jnp.float32(0.6)
    x, alpha, sigma = NOISE[:3], schedule.alpha(t), schedule.sigma(t)
    plain = denoiser(schedule)(x, t)
    found = steered(denoiser(schedule), match, schedule, jnp.float32(0.5))(x, t)
    left = sigma**2 / (alpha**2 + sigma**2)
    np.testing.assert_allclose(found, plain + 0.5 * left * (GOAL - plain), atol=1e-5)


def test_outside_the_interval_nothing_is_steered_or_looked_at():
    looked = []

    def seen(x0, t):
        jax.debug.callback(lambda: looked.append(1))
        return match(x0, t)

    schedule = RectifiedFlow()
    scale, interval = jnp.float32(1), (0.3, 0.7)
    guided = jax.jit(steered(denoiser(schedule), seen, schedule, scale, interval=interval))
    plain = jax.jit(denoiser(schedule))
    for t, inside in ((0.2, False), (0.5, True), (0.8, False)):
        looked.clear()
        t = jnp.float32(t)
        same = np.allclose(guided(NOISE, t), plain(NOISE, t), atol=1e-6)
        jax.effects_barrier()
        assert (same, bool(looked)) == (not inside, inside)


def test_clip_looks_at_the_whole_or_at_cut_outs_the_same_of_every_image():
    ramp = jnp.broadcast_to(jnp.linspace(-1, 1, 24)[None, None, :, None], (2, 16, 24, 3))
    assert look(ramp, 8, 0, jnp.float32(0.5)).shape == (2, 8, 8, 3)
    square = ramp[:, :, :16]
    np.testing.assert_array_equal(look(square, 16, 0, jnp.float32(0.5)), square)
    cuts = look(ramp, 8, 3, jnp.float32(0.5))
    assert cuts.shape == (6, 8, 8, 3)
    np.testing.assert_allclose(cuts[0::2], cuts[1::2], atol=1e-6)
    # A part of the ramp, as steep as it is large, and inside the picture.
    for cut in cuts[::2]:
        slope = float(cut[4, 6, 0] - cut[4, 1, 0]) / 5 * 8 / (2 / 23)
        assert 0.5 * 16 * 0.9 < slope < 16 * 1.1
        assert -1.01 <= float(cut.min()) <= float(cut.max()) <= 1.01
    assert not np.allclose(cuts[0], cuts[2])
    assert not np.allclose(cuts, look(ramp, 8, 3, jnp.float32(0.4)))


@pytest.mark.parametrize("wrong", [{"scale": -1.0}, {"interval": (0.6, 0.4)}, {"cutouts": -1}])
def test_numbers_out_of_range_are_told(wrong):
    with pytest.raises(UserError, match="ClipGuidance got"):
        ClipGuidance(**wrong)
