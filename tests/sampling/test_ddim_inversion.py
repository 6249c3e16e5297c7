"""DDIM inversion on Gaussian data, whose flow has a closed form, and the way there and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.errors import UserError
from jaxdiff.sampling.ddim_inversion import DDIMInverse, reversed_grid
from jaxdiff.sampling.loop import sample
from jaxdiff.sampling.solvers_ode import DDIM

STD = 0.5  # of the data
SEEDS = jnp.arange(3, dtype=jnp.uint32)
X0 = STD * jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 1)), jnp.float32)
GRID = TimeGrid()


def denoiser(schedule):
    def exact(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * STD**2 * x / ((alpha * STD) ** 2 + sigma**2)

    return exact


def inverted(schedule, steps, rounds):
    return sample(
        denoiser(schedule),
        DDIMInverse(rounds=rounds),
        schedule,
        reversed_grid(GRID),
        steps,
        X0,
        SEEDS,
        unit_noise=True,
    ).images


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine()])
def test_it_comes_to_where_the_flow_begins(schedule):
    """A Gaussian keeps its quantiles, so x_1 / std(x_1) = x_0 / std(x_0); of first order."""
    one = jnp.ones(())
    exact = X0 / STD * jnp.hypot(schedule.alpha(one) * STD, schedule.sigma(one))
    errors = [float(jnp.abs(inverted(schedule, n, 3) - exact).max()) for n in (50, 400)]
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine()])
def test_ddim_goes_back_the_same_way_and_the_more_rounds_the_closer(schedule):
    def gap(rounds):
        noise = inverted(schedule, 10, rounds)
        back = sample(
            denoiser(schedule), DDIM(), schedule, GRID, 10, noise, SEEDS, unit_noise=True
        ).images
        return float(jnp.abs(back - X0).max())

    gaps = [gap(rounds) for rounds in (1, 3, 40)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4


def test_without_a_round_it_cannot_be_made():
    with pytest.raises(UserError, match="rounds is 0"):
        DDIMInverse(rounds=0)
