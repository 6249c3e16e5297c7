"""Schedules: ends, norms, order, and agreement with the published forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import (
    LOG_SNR_LIMIT,
    Cosine,
    RectifiedFlow,
    ScaledLinear,
    Shifted,
    VarianceExploding,
    shift_time,
)
from jaxdiff.errors import UserError

VARIANCE_PRESERVING = [
    Cosine(),
    ScaledLinear(),
    ScaledLinear(zero_terminal_snr=True),
    Shifted(base=Cosine(), shift=4.0),
    Shifted(base=ScaledLinear(), shift=0.5),
]
SCHEDULES = [
    *VARIANCE_PRESERVING,
    RectifiedFlow(),
    VarianceExploding(),
    Shifted(base=RectifiedFlow(), shift=3.0),
    Shifted(base=VarianceExploding(), shift=2.0),
]
TIMES = np.linspace(0, 1, 1001)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_data_are_clean_at_zero_and_noise_dominates_at_one(schedule):
    ends = jnp.array([0.0, 1.0])
    alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert sigma[1] > 5 * alpha[1]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_log_snr_falls_and_is_finite_everywhere(schedule):
    log_snr = np.asarray(schedule.log_snr(jnp.asarray(TIMES)))
    assert np.all(np.abs(log_snr) <= LOG_SNR_LIMIT)
    assert np.all(np.diff(log_snr) < 0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_log_snr_matches_alpha_and_sigma(schedule):
    t = jnp.linspace(0.001, 0.999, 500)
    ratio = 2 * jnp.log(schedule.alpha(t) / schedule.sigma(t))
    np.testing.assert_allclose(schedule.log_snr(t), ratio, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("schedule", VARIANCE_PRESERVING, ids=repr)
def test_variance_is_preserved(schedule):
    t = jnp.asarray(TIMES)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, atol=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_flow_is_a_shift_of_time(shift):
    t, schedule = jnp.asarray(TIMES), Shifted(base=RectifiedFlow(), shift=shift)
    np.testing.assert_allclose(schedule.sigma(t), shift_time(t, shift), atol=1e-6)
    np.testing.assert_allclose(schedule.alpha(t), 1 - shift_time(t, shift), atol=1e-6)


def test_shift_divides_the_ratio_of_data_to_noise():
    t, base = jnp.linspace(0.1, 0.9, 9), Cosine()
    shifted = Shifted(base=base, shift=4.0)
    ratio, shifted_ratio = base.alpha(t) / base.sigma(t), shifted.alpha(t) / shifted.sigma(t)
    np.testing.assert_allclose(shifted_ratio, ratio / 4, rtol=1e-5)


def test_cosine_ends_at_min_log_snr():
    assert Cosine(min_log_snr=-6.0).log_snr(jnp.ones(())) == pytest.approx(-6, abs=1e-3)
    with jax.enable_x64(True):
        t = jnp.linspace(0, 1, 11)
        alpha = Cosine(min_log_snr=-60.0).alpha(t)
        np.testing.assert_allclose(alpha, np.cos(np.pi / 2 * np.linspace(0, 1, 11)), atol=1e-12)


def test_scaled_linear_is_stable_diffusions_table():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)
    t, schedule = jnp.arange(1, 1001) / 1000, ScaledLinear()
    np.testing.assert_allclose(schedule.alpha(t), np.sqrt(alpha_bar), rtol=1e-5)
    np.testing.assert_allclose(schedule.sigma(t), np.sqrt(1 - alpha_bar), rtol=1e-5)


def test_zero_terminal_snr_is_pure_noise_at_the_last_step():
    """Algorithm 1 of Lin et al. 2023, as published."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    rescaled = (root - root[-1]) * root[0] / (root[0] - root[-1])
    t, schedule = jnp.arange(1, 1001) / 1000, ScaledLinear(zero_terminal_snr=True)
    np.testing.assert_allclose(schedule.alpha(t), rescaled, rtol=1e-5, atol=1e-7)
    assert (schedule.alpha(t)[-1], schedule.sigma(t)[-1]) == (0, 1)


def test_between_training_steps_the_noise_to_data_ratio_is_linear():
    schedule, t = ScaledLinear(), jnp.array([0.4, 0.4003, 0.401])
    low, middle, high = schedule.sigma(t) / schedule.alpha(t)
    assert float(middle) == pytest.approx(float(0.7 * low + 0.3 * high), rel=1e-5)


def test_variance_exploding_follows_the_rho_grid_of_edm():
    low, high, i = 0.002 ** (1 / 7), 80 ** (1 / 7), np.arange(18)
    edm = (high + i / 17 * (low - high)) ** 7
    t = jnp.asarray(1 - i / 17).at[-1].set(1e-9)  # at t = 0 sigma is 0
    np.testing.assert_allclose(VarianceExploding().sigma(t), edm, rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_time_at_inverts_the_noise_to_data_ratio(schedule):
    t = jnp.linspace(0.002, 0.998, 250)
    noise_to_data = schedule.sigma(t) / schedule.alpha(t)
    np.testing.assert_allclose(schedule.time_at(noise_to_data), t, atol=2e-5)
    np.testing.assert_array_equal(schedule.time_at(jnp.array([0.0, jnp.inf])), [0.0, 1.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cosine(min_log_snr=1.0),
        lambda: ScaledLinear(beta_start=0.1, beta_end=0.01),
        lambda: VarianceExploding(sigma_min=0.0),
        lambda: Shifted(shift=0.0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(UserError, match="expected"):
        make()
