"""Conversions form a cycle for every prediction type on every schedule."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.process import FLOOR, Prediction, add_noise, from_x0_eps, to_x0_eps
from jaxdiff.diffusion.schedules import (
    Cosine,
    RectifiedFlow,
    ScaledLinear,
    Shifted,
    VarianceExploding,
)

PREDICTIONS = get_args(Prediction)
SCHEDULES = [
    Cosine(),
    ScaledLinear(),
    RectifiedFlow(),
    VarianceExploding(sigma_max=10.0),
    Shifted(base=RectifiedFlow(), shift=3.0),
]


@pytest.fixture
def pair():
    keys = jax.random.split(jax.random.key(0))
    return [jax.random.normal(key, (9, 4, 3, 2)) for key in keys]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_form_a_cycle(schedule, prediction, pair):
    x0, eps = pair
    t = jnp.linspace(0.1, 0.9, 9)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = add_noise(schedule, x0, eps, t)
    output = from_x0_eps(prediction, x0, eps, alpha, sigma)
    again = to_x0_eps(prediction, output, x_t, alpha, sigma)
    np.testing.assert_allclose(again[0], x0, atol=2e-4)
    np.testing.assert_allclose(again[1], eps, atol=2e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_output_reconstructs_x_t(schedule, prediction, pair):
    """alpha x0 + sigma eps = x_t for any output, right or wrong."""
    x_t, output = pair
    t = jnp.asarray(0.4)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x0, eps = to_x0_eps(prediction, output, x_t, alpha, sigma)
    np.testing.assert_allclose(alpha * x0 + sigma * eps, x_t, atol=1e-5)
    np.testing.assert_allclose(from_x0_eps(prediction, x0, eps, alpha, sigma), output, atol=1e-5)


def test_velocity_is_the_derivative_of_a_rectified_flow(pair):
    x0, eps = pair
    t = jnp.linspace(0.1, 0.9, 9)
    _, derivative = jax.jvp(
        lambda t: add_noise(RectifiedFlow(), x0, eps, t), (t,), (jnp.ones_like(t),)
    )
    velocity = from_x0_eps("velocity", x0, eps, 1 - t, t)
    np.testing.assert_allclose(velocity, derivative, rtol=1e-6, atol=1e-6)


def test_v_is_the_derivative_by_the_angle_where_variance_is_preserved(pair):
    x0, eps = pair
    angle = jnp.linspace(0.1, 1.4, 9)

    def path(angle):
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return cos.reshape(-1, 1, 1, 1) * x0 + sin.reshape(-1, 1, 1, 1) * eps

    _, derivative = jax.jvp(path, (angle,), (jnp.ones_like(angle),))
    v = from_x0_eps("v", x0, eps, jnp.cos(angle), jnp.sin(angle))
    np.testing.assert_allclose(v, derivative, atol=1e-5)


def test_v_has_unit_variance_on_every_schedule():
    keys = jax.random.split(jax.random.key(1))
    x0, eps = (jax.random.normal(key, (3, 64, 64, 1)) for key in keys)
    for schedule in SCHEDULES:
        t = jnp.array([0.05, 0.5, 0.95])
        v = from_x0_eps("v", x0, eps, schedule.alpha(t), schedule.sigma(t))
        np.testing.assert_allclose(jnp.std(v, axis=(1, 2, 3)), 1, atol=0.05)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends_stay_finite(prediction, t, pair):
    x_t, output = pair
    levels = jnp.asarray(1 - t), jnp.asarray(t)
    for part in to_x0_eps(prediction, output, x_t, *levels):
        assert jnp.all(jnp.isfinite(part))
        assert jnp.max(jnp.abs(part)) < 10 / FLOOR
