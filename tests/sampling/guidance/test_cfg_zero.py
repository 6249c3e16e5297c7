"""CFG-Zero*: the optimal scale and the steps of velocity 0, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.process import to_x0_eps
from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.errors import UserError
from jaxdiff.sampling.guidance.cfg import ConditionedModel, guided_denoiser
from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar, zero_velocity_x0
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.loop import sample
from jaxdiff.sampling.solvers_ode import Euler

X, C, U = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 1))


@pytest.mark.parametrize(
    ("prediction", "quantity", "schedule"),
    [
        ("velocity", "velocity", RectifiedFlow()),
        ("x0", "velocity", RectifiedFlow()),
        ("eps", "eps", Cosine()),
        ("v", "v", Cosine()),
    ],
)
def test_the_unconditional_prediction_counts_as_its_nearest_multiple(
    prediction, quantity, schedule
):
    t = jnp.asarray(0.6)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)

    def x0(output):
        return to_x0_eps(quantity, output, X, alpha, sigma)[0]

    found = CFGZeroStar().optimized(x0(C), x0(U), X, alpha, sigma, prediction)
    products = [jnp.sum(U * other, axis=(1, 2, 3), keepdims=True) for other in (C, U)]
    np.testing.assert_allclose(found, x0(products[0] / products[1] * U), atol=2e-5)


def test_a_multiple_of_the_conditional_prediction_has_no_effect():
    alpha, sigma = jnp.asarray(0.4), jnp.asarray(0.6)
    cond, uncond = (to_x0_eps("velocity", v, X, alpha, sigma)[0] for v in (C, 0.3 * C))
    found = CFGZeroStar().optimized(cond, uncond, X, alpha, sigma, "velocity")
    np.testing.assert_allclose(found, cond, atol=1e-5)


@pytest.mark.parametrize("zero_steps", [0, 1, 3])
def test_the_first_steps_have_velocity_0(zero_steps):
    """The velocity is 1: x goes down by what is left of the time."""
    schedule, grid, num_steps = RectifiedFlow(), TimeGrid(), 8
    model = ConditionedModel(
        network=lambda x, t, cond: jnp.ones_like(x),
        prediction="velocity",
        schedule=schedule,
        cond=jnp.zeros(2),
        uncond=jnp.zeros(2),
    )
    guidance = Guidance(cfg_zero_star=CFGZeroStar(zero_steps=zero_steps))
    times = [grid(jnp.int32(i), jnp.int32(num_steps), 1) for i in (zero_steps - 1, zero_steps)]
    above = sum(times) / 2 if zero_steps else None
    denoiser = guided_denoiser(model, guidance, jnp.full(2, 3.0), zero_init_until=above)
    noise = sample(denoiser, Euler(), schedule, grid, num_steps, X, jnp.arange(2)).images
    np.testing.assert_allclose(noise, X - times[1], atol=1e-5)


def test_where_the_velocity_is_zero_x0_and_eps_are_the_same():
    x0, eps = to_x0_eps("velocity", jnp.zeros_like(X), X, jnp.asarray(0.8), jnp.asarray(0.5))
    np.testing.assert_allclose(x0, eps, atol=1e-6)
    np.testing.assert_allclose(
        zero_velocity_x0(X, jnp.asarray(0.8), jnp.asarray(0.5)), x0, atol=1e-6
    )


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(UserError, match="zero_steps is -1"):
        CFGZeroStar(zero_steps=-1)
