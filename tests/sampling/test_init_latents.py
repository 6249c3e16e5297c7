"""The loop with latents to start from: where it begins, and what a mask keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.sampling.loop import InitLatents, noise_from_seeds, sample
from jaxdiff.sampling.solver import Step, stateless
from jaxdiff.sampling.solvers_ode import DDIM, DPMSolverPP2M

SHAPE, STEPS = (4, 4, 2), 6
SEEDS = jnp.arange(2, dtype=jnp.uint32)
NOISE = noise_from_seeds(SEEDS, SHAPE)
X0 = noise_from_seeds(SEEDS + 7, SHAPE)
GRID = TimeGrid()
KEYS = jax.random.split(jax.random.key(0), 2)


def shrink(x, t):
    """A denoiser whose estimate depends on where it stands."""
    return 0.5 * x + t


def run(schedule, solver, init, first, noise=NOISE):
    init = None if init is None else init._replace(first_step=first)
    denoiser = stateless(shrink)
    return sample(denoiser, solver, schedule, GRID, STEPS, noise, SEEDS, init=init).images


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_sampling_begins_at_x0_with_the_noise_of_the_first_step(schedule):
    first, solver = 4, DDIM()
    t = GRID(first, STEPS, 1)
    x = schedule.alpha(t) * X0 + schedule.sigma(t) * NOISE
    for i in range(first, STEPS):
        now, then = GRID(i, STEPS, 1), GRID(i + 1, STEPS, 1)
        step = Step(
            now,
            schedule.alpha(now),
            schedule.sigma(now),
            then,
            schedule.alpha(then),
            schedule.sigma(then),
        )
        x = solver.step(stateless(shrink).denoise, x, (), (), step, KEYS).x
    np.testing.assert_allclose(run(schedule, solver, InitLatents(X0), first), x, atol=1e-5)


@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP2M(), DDIM(eta=1.0)])
def test_what_the_mask_keeps_ends_as_it_was(solver):
    mask = np.zeros((2, 4, 4, 1), np.float32)
    mask[:, :2] = 1
    for first in (0, 3):
        images = run(RectifiedFlow(), solver, InitLatents(X0, jnp.asarray(mask)), first)
        np.testing.assert_allclose(images[:, 2:], X0[:, 2:], atol=1e-6)
        assert np.abs(images[:, :2] - X0[:, :2]).min(axis=(1, 2, 3)).max() > 1e-3


def test_a_mask_of_ones_from_the_first_step_is_sampling_from_noise():
    everything = InitLatents(X0, jnp.ones((2, 4, 4, 1)), from_noise=True)
    for schedule in (Cosine(), RectifiedFlow()):
        sampled = run(schedule, DDIM(), everything, 0)
        np.testing.assert_allclose(sampled, run(schedule, DDIM(), None, 0), atol=1e-6)


def test_without_a_mask_some_of_x0_is_left_in_the_first_step():
    """Where the schedule leaves any: at t = 1 the cosine does, a rectified flow does not."""
    plain = run(Cosine(), DDIM(), None, 0)
    assert np.abs(run(Cosine(), DDIM(), InitLatents(X0), 0) - plain).max() > 1e-3
    straight = run(RectifiedFlow(), DDIM(), InitLatents(X0), 0)
    np.testing.assert_allclose(straight, run(RectifiedFlow(), DDIM(), None, 0), atol=1e-6)


def test_the_first_step_may_be_traced():
    traced = jax.jit(lambda first: run(Cosine(), DDIM(), InitLatents(X0), first))
    for first in (0, 2, 5):
        expected = run(Cosine(), DDIM(), InitLatents(X0), first)
        np.testing.assert_allclose(traced(jnp.int32(first)), expected, atol=1e-5)
    assert traced._cache_size() == 1


def test_resampling_keeps_the_marginals():
    """Of unit data under noise: going up by fresh noise and down again leaves them as they are."""
    seeds = jnp.arange(4000, dtype=jnp.uint32)
    noise = noise_from_seeds(seeds, (1, 1, 1))
    for schedule in (RectifiedFlow(), Cosine()):

        def exact(x, t, schedule=schedule):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            return alpha * x / (alpha**2 + sigma**2)

        sampled = [
            sample(
                stateless(exact), DDIM(), schedule, GRID, 60, noise, seeds, resample_steps=r
            ).images.ravel()
            for r in (1, 3)
        ]
        for images in sampled:
            assert abs(float(images.mean())) < 0.06
            assert 0.9 < float(images.std()) < 1.06
        assert abs(np.corrcoef(*sampled)[0, 1]) < 0.5  # the noise at the start is forgotten


def test_resampling_makes_what_is_sampled_fit_what_is_kept():
    """Two pixels that are always equal: one is kept, the other is sampled."""
    seeds = jnp.arange(400, dtype=jnp.uint32)
    noise = noise_from_seeds(seeds, (1, 2, 1))
    x0 = jnp.repeat(noise_from_seeds(seeds + 1000, (1, 1, 1)), 2, axis=2)
    mask = jnp.broadcast_to(jnp.array([0.0, 1.0])[None, None, :, None], x0.shape)
    schedule = RectifiedFlow()

    def exact(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        mean = jnp.mean(x, axis=2, keepdims=True)
        return jnp.broadcast_to(alpha * mean / (alpha**2 + sigma**2 / 2), x.shape)

    def gap(resample_steps):
        images = sample(
            stateless(exact),
            DDIM(),
            schedule,
            GRID,
            20,
            noise,
            seeds,
            init=InitLatents(x0, mask, from_noise=True),
            resample_steps=resample_steps,
        ).images
        return float(jnp.mean((images[:, 0, 1] - images[:, 0, 0]) ** 2))

    assert gap(8) < 0.5 * gap(1)
