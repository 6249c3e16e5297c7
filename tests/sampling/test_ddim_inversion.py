"""DDIM inversion on Gaussian data, whose flow has a closed form, and the way there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.errors import UserError
from jaxdiff.sampling.ddim_inversion import DDIMInverse, reverse_grid
from jaxdiff.sampling.loop import sample
from jaxdiff.sampling.solver import StatefulDenoiser, stateless
from jaxdiff.sampling.solvers_ode import DDIM

STD = 0.5  # of the data
SEEDS = jnp.arange(3, dtype=jnp.uint32)
X0 = STD * jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 1)), jnp.float32)
GRID = TimeGrid()


def denoiser(schedule):
    def exact(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * STD**2 * x / ((alpha * STD) ** 2 + sigma**2)

    return stateless(exact)


def inverted(schedule, steps, rounds):
    return sample(
        denoiser(schedule),
        DDIMInverse(rounds=rounds),
        schedule,
        reverse_grid(GRID),
        steps,
        X0,
        SEEDS,
        init_noise="unit",
    ).images


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine()])
def test_inversion_reaches_the_start_of_the_flow(schedule):
    """A Gaussian keeps its quantiles, so x_1 / std(x_1) = x_0 / std(x_0); of first order."""
    one = jnp.ones(())
    exact = X0 / STD * jnp.hypot(schedule.alpha(one) * STD, schedule.sigma(one))
    errors = [float(jnp.abs(inverted(schedule, n, 3) - exact).max()) for n in (50, 400)]
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine()])
def test_ddim_undoes_it_and_more_rounds_are_more_exact(schedule):
    def gap(rounds):
        noise = inverted(schedule, 10, rounds)
        back = sample(
            denoiser(schedule), DDIM(), schedule, GRID, 10, noise, SEEDS, init_noise="unit"
        ).images
        return float(jnp.abs(back - X0).max())

    gaps = [gap(rounds) for rounds in (1, 3, 40)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4


def test_zero_rounds_are_refused():
    with pytest.raises(UserError, match="rounds is 0"):
        DDIMInverse(rounds=0)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_denoisers_state_advances_once_per_step(rounds):
    """Every evaluation of a step sees the same state, and the first one's result is kept."""
    seen = []

    def denoise(x, t, state):
        jax.debug.callback(lambda count: seen.append(int(count)), state)
        return 0.5 * x, state + 1

    counting = StatefulDenoiser(denoise=denoise, init_state=lambda x: jnp.zeros((), jnp.int32))
    inverse = DDIMInverse(rounds=rounds)
    schedule, grid = RectifiedFlow(), reverse_grid(GRID)
    sampled = sample(counting, inverse, schedule, grid, 4, X0, SEEDS, init_noise="unit")
    jax.block_until_ready(sampled.images)
    jax.effects_barrier()
    assert sorted(seen) == sorted([0, 1, 2, 3] * rounds)
