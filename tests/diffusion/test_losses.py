"""Weightings of the loss: the papers' weights, and sums by noise level."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.losses import MinSNR, SigmoidWeighting, UniformWeighting, loss_by_level
from jaxdiff.errors import UserError

LOG_SNR = jnp.linspace(-12, 12, 49)


def test_min_snr_is_the_papers_in_each_space():
    snr, weighting = np.exp(LOG_SNR), MinSNR(gamma=5.0)
    capped = np.minimum(snr, 5.0)
    for space, expected in {"x0": capped, "eps": capped / snr, "v": capped / (snr + 1)}.items():
        np.testing.assert_allclose(weighting(LOG_SNR, space), expected, rtol=1e-4)


def test_sigmoid_is_the_papers_on_eps_and_on_x0():
    weighting, lam, b = SigmoidWeighting(bias=-1.0), np.asarray(LOG_SNR), -1.0
    np.testing.assert_allclose(weighting(LOG_SNR, "eps"), 1 / (1 + np.exp(lam - b)), rtol=1e-4)
    # Simple diffusion 2 states it on x0 as exp(b) sigmoid(lam - b).
    on_x0 = np.exp(b) / (1 + np.exp(b - lam))
    np.testing.assert_allclose(weighting(LOG_SNR, "x0"), on_x0, rtol=1e-4)


@pytest.mark.parametrize("weighting", [MinSNR(), SigmoidWeighting()])
def test_the_weight_on_x0_is_snr_times_that_on_eps(weighting):
    on_eps, on_x0 = weighting(LOG_SNR, "eps"), weighting(LOG_SNR, "x0")
    np.testing.assert_allclose(on_x0, np.exp(LOG_SNR) * on_eps, rtol=1e-4)


def test_uniform_weights_are_one_in_the_space_of_the_loss():
    for space in ("x0", "eps", "v", "velocity"):
        np.testing.assert_array_equal(UniformWeighting()(LOG_SNR, space), np.ones(len(LOG_SNR)))


def test_levels_sum_and_count_the_losses():
    t = jnp.array([1e-5, 0.1, 0.11, 0.2, 0.95, 1.0])
    loss = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    sums, counts = loss_by_level(loss, t)
    np.testing.assert_array_equal(sums, [3, 12, 0, 0, 0, 0, 0, 0, 0, 48])
    np.testing.assert_array_equal(counts, [2, 2, 0, 0, 0, 0, 0, 0, 0, 2])


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="positive"):
        MinSNR(gamma=0.0)
