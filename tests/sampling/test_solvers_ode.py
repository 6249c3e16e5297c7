"""Solvers reach their order on a Gaussian mixture whose flow is known exactly.

In one dimension the probability flow cannot cross itself, so it keeps every quantile: the exact
end of the path from x_1 is the x_0 with F_0(x_0) = F_1(x_1), where F_t is the mixture's
distribution function at t.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow, ScaledLinear, VarianceExploding
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.errors import UserError
from jaxdiff.sampling.loop import STEP_NOISE, keys_from_seeds, noise_from_seeds, sample
from jaxdiff.sampling.solver import Step, noise_like, stateless
from jaxdiff.sampling.solvers_ode import DDIM, PLMS, Churn, DPMSolverPP2M, Euler, Heun
from jaxdiff.sampling.solvers_sde import DDPM, LCM, DPMSolverPP2MSDE, DPMSolverPPSDE, EulerAncestral
from jaxdiff.sampling.unipc import UniPC

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
        exact = _exact_end(schedule, schedule.sigma(jnp.ones(())) * noise, grid(1, 1, 1))

        @jax.jit
        def run(num_steps):
            denoise = _mixture_denoiser(schedule)
            return sample(
                stateless(denoise), solver, schedule, grid, num_steps, noise, jnp.arange(41)
            ).images

        return np.array([float(jnp.sqrt(jnp.mean((run(n) - exact) ** 2))) for n in steps])


def _even_down_to_a_twentieth(i, num_steps, num_tokens):
    return 1 - 0.95 * i / jnp.asarray(num_steps, float)


@pytest.mark.parametrize(
    "grid", [_even_down_to_a_twentieth, TimeGrid(rho=1.5)], ids=["while-noisy", "into-data"]
)
@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine()], ids=repr)
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (Euler(), 0.9),
        (Heun(), 1.9),
        (Heun(variable="sigma"), 1.85),
        (DPMSolverPP2M(), 1.85),
        (UniPC(), 2.6),
        (UniPC(variant="bh1"), 2.5),
    ],
    ids=["euler", "heun", "heun-sigma", "2m", "unipc", "unipc-bh1"],
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
def test_second_order_is_more_exact_at_few_steps(schedule):
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
        sample(stateless(denoise), solver, schedule, TimeGrid(), 10, noise, seeds).images
        for solver in (DDIM(eta=0.0), Euler())
    ]
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize("solver", [UniPC(), DPMSolverPP2M()], ids=repr)
@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine(), ScaledLinear()], ids=repr)
def test_fifteen_steps_of_the_multistep_solvers_beat_fifty_of_ddim(schedule, solver):
    grid = TimeGrid(rho=1.5)
    assert _errors(schedule, solver, grid, [15])[0] < _errors(schedule, DDIM(), grid, [50])[0]


def _ends(schedule, solver, *, steps=10, count=5):
    seeds = jnp.arange(count)
    noise = noise_from_seeds(seeds, (2, 2, 1))
    denoise = _mixture_denoiser(schedule)
    return sample(stateless(denoise), solver, schedule, TimeGrid(), steps, noise, seeds).images


def _churned(schedule):
    return Heun(churn=Churn(schedule=schedule, gamma=0.2))


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()], ids=repr)
@pytest.mark.parametrize(
    "solver",
    [
        lambda _: DDIM(eta=0.5),
        lambda _: DDIM(eta=1.0),
        lambda _: DPMSolverPPSDE(eta=0.5),
        lambda _: DPMSolverPP2MSDE(),
        _churned,
    ],
    ids=["ddim-0.5", "ddim-1", "sde-0.5", "2m-sde", "churn"],
)
def test_however_much_noise_is_added_mean_and_variance_are_those_of_the_data(schedule, solver):
    images = _ends(schedule, solver(schedule), steps=100, count=2000)
    mean = np.sum(WEIGHTS * MEANS)
    std = np.sqrt(np.sum(WEIGHTS * (STDS**2 + MEANS**2)) - mean**2)
    assert float(images.mean()) == pytest.approx(mean, abs=0.03)
    assert float(images.std()) == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()], ids=repr)
def test_lcm_keeps_the_distribution_in_any_number_of_jumps(schedule, steps):
    """With the consistency function of normal data, which is linear."""
    mean, std = 0.4, 0.3

    def jump(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return mean + std * (x - alpha * mean) / jnp.hypot(alpha * std, sigma)

    seeds = jnp.arange(2000)
    noise = noise_from_seeds(seeds, (2, 2, 1))
    images = sample(stateless(jump), LCM(), schedule, TimeGrid(), steps, noise, seeds).images
    assert float(images.mean()) == pytest.approx(mean, abs=0.015)
    assert float(images.std()) == pytest.approx(std, rel=0.03)


def test_lcm_leaves_data_as_they_are():
    x, keys = jnp.full((1, 2, 2, 1), 0.7), jax.random.split(jax.random.key(0), 1)
    step = Step(*jnp.array([1e-7, 1.0, 1e-7, 0.0, 1.0, 0.0]))
    stepped = LCM().step(lambda x, t, state: (jnp.zeros_like(x), state), x, (), (), step, keys)
    np.testing.assert_allclose(stepped.x, x, rtol=1e-4)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine(), VarianceExploding()], ids=repr)
@pytest.mark.parametrize(
    ("stochastic", "deterministic"),
    [
        (EulerAncestral(eta=0.0), Euler()),
        (DPMSolverPPSDE(eta=0.0), Euler()),
        (DPMSolverPP2MSDE(eta=0.0), DPMSolverPP2M()),
        (Heun(churn=Churn(schedule=Cosine(), gamma=0.0)), Heun()),
    ],
    ids=["euler-a", "sde", "2m-sde", "churn"],
)
def test_without_noise_they_are_the_solvers_of_the_ode(schedule, stochastic, deterministic):
    np.testing.assert_array_equal(_ends(schedule, stochastic), _ends(schedule, deterministic))


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine(), VarianceExploding()], ids=repr)
@pytest.mark.parametrize("solver", [DDPM(), EulerAncestral(), DPMSolverPPSDE()], ids=repr)
def test_first_order_solvers_with_the_posteriors_noise_are_one(schedule, solver):
    """With as much noise, one evaluation and no state there is no other step to take."""
    ancestral = _ends(schedule, DDIM(eta=1.0))
    np.testing.assert_allclose(_ends(schedule, solver), ancestral, rtol=1e-4, atol=1e-4)


def test_ddpm_samples_the_posterior():
    """Ho et al. 2020, eq. 6 and 7, as they write it."""
    x, x0 = jnp.full((1, 4, 4, 1), 0.3), jnp.full((1, 4, 4, 1), -0.2)
    keys, bar, next_bar = jax.random.split(jax.random.key(0), 1), 0.4, 0.55
    alpha_t, beta_t = bar / next_bar, 1 - bar / next_bar
    mean = next_bar**0.5 * beta_t / (1 - bar) * x0 + alpha_t**0.5 * (1 - next_bar) / (1 - bar) * x
    std = np.sqrt((1 - next_bar) / (1 - bar) * beta_t)
    denoise = stateless(lambda x, t: x0).denoise
    levels = [0.5, bar**0.5, (1 - bar) ** 0.5, 0.4, next_bar**0.5, (1 - next_bar) ** 0.5]
    found = DDPM().step(denoise, x, (), (), Step(*jnp.array(levels)), keys).x
    np.testing.assert_allclose(found, mean + std * noise_like(x, keys), rtol=1e-5)


def test_heun_with_churn_is_algorithm_2_of_edm():
    """Written as there, for sigma alone, with the noise of the sampler."""
    schedule, steps, seeds = VarianceExploding(), 12, jnp.arange(3)
    churn = Churn(schedule=schedule, gamma=0.3, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)
    solver = Heun(variable="sigma", churn=churn)
    noise = noise_from_seeds(seeds, (2, 2, 1))
    denoise, keys = _mixture_denoiser(schedule), keys_from_seeds(seeds, STEP_NOISE)
    sigmas = np.asarray(schedule.sigma(TimeGrid()(jnp.arange(steps + 1), steps, 1)), float)

    def slope(x, sigma):
        return (x - denoise(x, schedule.time_at(jnp.asarray(sigma, x.dtype)))) / sigma

    x = sigmas[0] * noise
    for i, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
        fresh = noise_like(x, jax.vmap(jax.random.fold_in, (0, None))(keys, i))
        raised = sigma * 1.3 if 0.05 <= sigma <= 50 else sigma
        x = x + np.sqrt(raised**2 - sigma**2) * 1.003 * fresh
        d = slope(x, raised)
        euler = x + (next_sigma - raised) * d
        if next_sigma > 0:
            d = (d + slope(euler, next_sigma)) / 2
        x = x + (next_sigma - raised) * d
    found = sample(stateless(denoise), solver, schedule, TimeGrid(), steps, noise, seeds).images
    np.testing.assert_allclose(found, x, atol=1e-4)


def test_ddims_noise_differs_between_steps_and_seeds():
    schedule, seeds = RectifiedFlow(), jnp.array([1, 1, 2])
    noise = jnp.ones((3, 4, 4, 1))
    denoise = _mixture_denoiser(schedule)
    first, same, other = sample(
        stateless(denoise), DDIM(eta=1.0), schedule, TimeGrid(), 5, noise, seeds
    ).images
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)


def test_heun_evaluates_twice_a_step_but_once_in_the_last():
    calls = []

    def denoise(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return 0.5 * x

    schedule, noise = RectifiedFlow(), jnp.ones((1, 1, 1, 1))
    images = sample(
        stateless(denoise), Heun(), schedule, TimeGrid(), 4, noise, jnp.array([0])
    ).images
    jax.block_until_ready(images)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(calls), [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDIM(eta=1.5),
        lambda: EulerAncestral(eta=-0.1),
        lambda: DPMSolverPPSDE(eta=2.0),
        lambda: DPMSolverPP2MSDE(eta=2.0),
        lambda: LCM(time_scale=0.0),
        lambda: Churn(schedule=Cosine(), gamma=0.5),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(UserError, match="expected"):
        make()
