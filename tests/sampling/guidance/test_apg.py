"""Adaptive projected guidance: what is left of the difference, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.errors import UserError
from jaxdiff.sampling.guidance.apg import APG, along
from jaxdiff.sampling.guidance.cfg import ConditionedModel, guided_denoiser
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.loop import sample
from jaxdiff.sampling.solvers_ode import Euler, Heun
from jaxdiff.sampling.solvers_sde import DDPM

COND, DIFFERENCE = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eta_is_what_counts_of_the_part_along_the_conditional_estimate(eta):
    found = APG(eta=eta).project(DIFFERENCE, COND)
    np.testing.assert_allclose(along(found, COND), eta * along(DIFFERENCE, COND), atol=1e-6)
    across = DIFFERENCE - along(DIFFERENCE, COND) * COND
    np.testing.assert_allclose(found - along(found, COND) * COND, across, rtol=1e-6, atol=1e-6)


def test_of_nothing_nothing_is_along():
    np.testing.assert_array_equal(along(DIFFERENCE, jnp.zeros_like(COND)), np.zeros((3, 1, 1, 1)))


def test_only_longer_differences_are_shortened_to_the_threshold():
    long_and_short = DIFFERENCE * jnp.array([10.0, 0.1, 0.0]).reshape(-1, 1, 1, 1)
    found = APG(eta=1.0, norm_threshold=3.0).project(long_and_short, COND)
    lengths = jnp.sqrt(jnp.sum(found**2, axis=(1, 2, 3)))
    assert lengths[0] == pytest.approx(3.0)
    np.testing.assert_array_equal(found[1:], long_and_short[1:])


@pytest.mark.parametrize("solver", [Euler(), Heun(), DDPM()], ids=repr)
def test_momentum_is_of_one_difference_a_step(solver):
    """Prompts that change x0 by 1 at every step: after n of them 1 + m + ... + m^(n - 1)."""
    momentum, steps = -0.5, 6
    model = ConditionedModel(
        network=lambda x, t, cond: jnp.broadcast_to(cond.reshape(-1, 1, 1, 1), x.shape),
        prediction="x0",
        schedule=RectifiedFlow(),
        cond=jnp.ones(2),
        uncond=jnp.zeros(2),
    )
    guidance = Guidance(apg=APG(eta=1.0, momentum=momentum))
    denoiser = guided_denoiser(model, guidance, jnp.array([1.0, 3.0]))
    noise, seeds = jnp.zeros((2, 1, 1, 1)), jnp.arange(2)
    sampled = sample(
        denoiser, solver, model.schedule, TimeGrid(), steps, noise, seeds, num_snapshots=steps
    )
    sums = np.cumsum(momentum ** np.arange(steps))
    x0 = sampled.snapshots[:, :, 0, 0, 0]
    np.testing.assert_allclose(x0[:, 0], np.ones(steps))
    np.testing.assert_allclose(x0[:, 1], 1 + 2 * sums, rtol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"eta": 2.0}, {"momentum": -1.0}, {"norm_threshold": 0.0}, {"norm_threshold": -1.0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=r"APG.* is .*: expected"):
        APG(**wrong)
