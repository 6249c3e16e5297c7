"""The sigmas of diffusers' pipelines of FLUX.1, FLUX.2 and Z-Image, and of its training scripts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.time_grids import FlowGrid
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.diffusion.time_shifts import EmpiricalShift, TokenShift

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.training_utils import compute_density_for_timestep_sampling

pytestmark = pytest.mark.parity

TOKENS = (16, 256, 1024, 4096, 4301, 16384)
STEPS = (1, 2, 4, 8, 28, 50, 200)


def expected(num_steps, mu, **config):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    return scheduler.sigmas.numpy()


@pytest.mark.parametrize(
    ("shift", "mu", "form"),
    [
        (TokenShift(), lambda tokens, steps: calculate_shift(tokens), "exponential"),
        (TokenShift(form="linear"), lambda tokens, steps: calculate_shift(tokens), "linear"),
        (EmpiricalShift(), compute_empirical_mu, "exponential"),
    ],
)
@pytest.mark.parametrize("terminal", [None, 0.02])
def test_dynamic_shifts(shift, mu, form, terminal):
    grid = FlowGrid(token_shift=shift, terminal=terminal)
    run = jax.jit(grid, static_argnums=2)
    for tokens in TOKENS:
        for steps in STEPS[1:] if terminal else STEPS:
            times = run(jnp.arange(steps + 1), steps, tokens)
            config = {"use_dynamic_shifting": True, "time_shift_type": form}
            sigmas = expected(steps, mu(tokens, steps), shift_terminal=terminal, **config)
            np.testing.assert_allclose(times, sigmas, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 1.37])
@pytest.mark.parametrize("steps", STEPS)
def test_a_constant_shift(shift, steps):
    times = FlowGrid(shift=shift)(jnp.arange(steps + 1), steps, 4096)
    np.testing.assert_allclose(times, expected(steps, None, shift=shift), atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_times(shift):
    """The training scripts take the scheduler's timestep at a density's index, descending."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    u = compute_density_for_timestep_sampling(
        "logit_normal", 200_000, logit_mean=0.0, logit_std=1.0, generator=torch.manual_seed(0)
    )
    theirs = scheduler.sigmas[(u * 1000).long()].numpy()
    ours = LogitNormal(shift=shift)(jax.random.key(0), 200_000, 4096)
    quantiles = np.linspace(0.01, 0.99, 50)
    difference = np.quantile(ours, quantiles) - np.quantile(theirs, quantiles)
    assert np.abs(difference).max() < 5e-3
