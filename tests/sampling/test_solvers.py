"""Solvers reach their order on a Gaussian mixture whose flow is known exactly.

In one dimension the probability flow cannot cross itself, so it keeps every quantile: the exact
end of the path from x_1 is the x_0 with F_0(x_0) = F_1(x_1), where F_t is the mixture's
distribution function at t.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import (
    Cosine,
    RectifiedFlow,
    ScaledLinear,
    TimeGrid,
    VarianceExploding,
)
from jaxdiff.errors import UserError
from jaxdiff.sampling.sampler import noise_from_seeds, sample
from jaxdiff.sampling.solvers import DDIM, PLMS, DPMSolverPP2M, Euler, Heun

WEIGHTS = np.array([0.3, 0.5, 0.2])
MEANS = np.array([-1.0, 0.2, 1.1])
STDS = np.array([0.3, 0.5, 0.25])


def _mixture_denoiser(schedule):
    """E[x0 | x_t], the mean over components of the linear estimate under each."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = (alpha * STDS) ** 2 + sigma**2
        off = x[..., None] - alpha * MEANS
        logits = jnp.log(WEIGHTS) - jnp.log(variance) / 2 - off**2 / (2 * variance)
        estimates = MEANS + alpha * STDS**2 / variance * off
        return jnp.sum(jax.nn.softmax(logits) * estimates, axis=-1)

    return denoise


def _quantile(x, alpha, sigma):
    return jnp.sum(
        WEIGHTS
        * jax.scipy.stats.norm.cdf(
            x[..., None], alpha * MEANS, jnp.sqrt((alpha * STDS) ** 2 + sigma**2)
        ),
        axis=-1,
    )


def _exact_end(schedule, x_1, t):
    """Where the paths from x_1 stand at t, by bisection."""
    target = _quantile(x_1, schedule.alpha(jnp.ones(())), schedule.sigma(jnp.ones(())))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        beyond = _quantile(middle, alpha, sigma) > target
        return jnp.where(beyond, low, middle), jnp.where(beyond, middle, high)

    bounds = jnp.full_like(x_1, -10.0), jnp.full_like(x_1, 10.0)
    return jax.lax.fori_loop(0, 60, halve, bounds)[0]


def _errors(schedule, solver, grid, steps):
    """The root mean square error at the end of the path, for each number of steps."""
    with jax.enable_x64(True):
        noise = jnp.linspace(-2.5, 2.5, 41).reshape(-1, 1, 1, 1)
        exact = _exact_end(schedule, schedule.sigma(jnp.ones(())) * noise, grid(1, 1))

        @jax.jit
        def run(num_steps):
            denoise = _mixture_denoiser(schedule)
            return sample(denoise, solver, schedule, grid, num_steps, noise, jnp.arange(41)).images

        return np.array([float(jnp.sqrt(jnp.mean((run(n) - exact) ** 2))) for n in steps])


def _even_down_to_a_twentieth(i, num_steps):
    return 1 - 0.95 * i / jnp.asarray(num_steps, float)


@pytest.mark.parametrize(
    "grid", [_even_down_to_a_twentieth, TimeGrid(rho=1.5)], ids=["while-noisy", "into-data"]
)
@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine()], ids=repr)
@pytest.mark.parametrize(
    ("solver", "order"),
    [(Euler(), 0.9), (Heun(), 1.9), (DPMSolverPP2M(), 1.85)],
    ids=["euler", "heun", "2m"],
)
def test_error_falls_at_the_order(schedule, solver, order, grid):
    steps = np.array([80, 160, 320, 640])
    errors = _errors(schedule, solver, grid, steps)
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(steps))
    assert np.all(slopes >= order), f"slopes {slopes}, errors {errors}"
    assert errors[-1] < 0.003


@pytest.mark.parametrize("schedule", [ScaledLinear(), Cosine()], ids=repr)
def test_plms_is_of_second_order_where_there_is_data_from_the_start(schedule):
    """Its weights are those of fourth order, but for steps even in sigma / alpha alone."""
    steps = np.array([80, 160, 320])
    errors = _errors(schedule, PLMS(), _even_down_to_a_twentieth, steps)
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(steps))
    assert np.all(slopes >= 1.9), f"slopes {slopes}, errors {errors}"


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine()], ids=repr)
def test_multistep_loses_a_logarithm_on_even_steps_into_data(schedule):
    """What its docstring says of steps that are long in log_snr."""
    errors = _errors(schedule, DPMSolverPP2M(), TimeGrid(), [80, 640])
    slope = -np.diff(np.log(errors))[0] / np.log(8)
    assert 1.4 < slope < 1.85


@pytest.mark.parametrize(
    "schedule", [RectifiedFlow(), Cosine(), ScaledLinear(), VarianceExploding()], ids=repr
)
def test_second_order_pays_at_few_steps(schedule):
    grid = TimeGrid() if isinstance(schedule, VarianceExploding) else TimeGrid(rho=1.5)
    euler, multistep = (
        _errors(schedule, solver, grid, [20])[0] for solver in (Euler(), DPMSolverPP2M())
    )
    assert multistep < 0.5 * euler


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine(), VarianceExploding()], ids=repr)
def test_ddim_without_noise_is_eulers_method(schedule):
    noise, seeds = noise_from_seeds(jnp.arange(5), (2, 2, 1)), jnp.arange(5)
    denoise = _mixture_denoiser(schedule)
    ends = [
        sample(denoise, solver, schedule, TimeGrid(), 10, noise, seeds).images
        for solver in (DDIM(eta=0.0), Euler())
    ]
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()], ids=repr)
def test_ddim_keeps_the_variance_however_much_noise_it_adds(schedule, eta):
    seeds = jnp.arange(2000)
    noise = noise_from_seeds(seeds, (2, 2, 1))
    images = sample(
        _mixture_denoiser(schedule), DDIM(eta=eta), schedule, TimeGrid(), 100, noise, seeds
    ).images
    mean = np.sum(WEIGHTS * MEANS)
    std = np.sqrt(np.sum(WEIGHTS * (STDS**2 + MEANS**2)) - mean**2)
    assert float(images.mean()) == pytest.approx(mean, abs=0.03)
    assert float(images.std()) == pytest.approx(std, rel=0.03)


def test_ddims_noise_differs_between_steps_and_seeds():
    schedule, seeds = RectifiedFlow(), jnp.array([1, 1, 2])
    noise = jnp.ones((3, 4, 4, 1))
    denoise = _mixture_denoiser(schedule)
    first, same, other = sample(
        denoise, DDIM(eta=1.0), schedule, TimeGrid(), 5, noise, seeds
    ).images
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)


def test_heun_evaluates_twice_a_step_but_once_in_the_last():
    calls = []

    def denoise(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return 0.5 * x

    schedule, noise = RectifiedFlow(), jnp.ones((1, 1, 1, 1))
    images = sample(denoise, Heun(), schedule, TimeGrid(), 4, noise, jnp.array([0])).images
    jax.block_until_ready(images)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(calls), [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0])


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="eta"):
        DDIM(eta=1.5)
