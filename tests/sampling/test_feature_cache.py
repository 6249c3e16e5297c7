"""Feature caching: which steps evaluate, what the others predict, and that images stay apart."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.sampling.feature_cache import (
    FirstBlockCache,
    Shallow,
    TaylorSeer,
    evaluate_cached,
    init_cache,
)


class Polynomial:
    """Features are a polynomial in time; the first block's residual is the conditioning."""

    def __init__(self, *coefficients):
        self.coefficients = coefficients

    def shallow(self, x, t, cond):
        return Shallow(residual=cond[:, None], inputs=(x, t))

    def deep(self, inputs):
        t = inputs[1][:, None]
        return sum(c * t**k for k, c in enumerate(self.coefficients)) * jnp.ones((1, 3))

    def finish(self, inputs, features):
        return inputs[0] + features[:, :, None, None]


def run(cache, network, times, residuals, num_images=None):
    """Return features [steps, rows] and the number of evaluations of each row after each step."""
    residuals = jnp.asarray(residuals, jnp.float32)
    x = jnp.zeros((residuals.shape[1], 3, 1, 1))
    state = init_cache(cache, network, x, jnp.ones(len(x)), residuals[0])
    features, evaluations = [], []
    for t, residual in zip(times, residuals, strict=True):
        out, state = evaluate_cached(
            cache, network, x, jnp.float32(t), residual, state, num_images or len(x)
        )
        features.append(np.asarray(out[:, 0, 0, 0]))
        evaluations.append(np.asarray(state.evaluations))
    return np.stack(features), np.stack(evaluations)


TIMES = np.array([1, 0.95, 0.85, 0.8, 0.6, 0.5, 0.4, 0.35, 0.2, 0.1])


@pytest.mark.parametrize(
    ("cache", "steps"),
    [
        (TaylorSeer(interval=3, warmup=3), [0, 1, 2, 4, 7]),
        (TaylorSeer(interval=2, warmup=0), [0, 1, 3, 5, 7, 9]),
        (TaylorSeer(interval=5, warmup=4), [0, 1, 2, 3, 5]),
        (TaylorSeer(interval=1, warmup=0), list(range(10))),
    ],
)
def test_steps_that_evaluate(cache, steps):
    _, evaluations = run(cache, Polynomial(1.0), TIMES, np.ones((10, 2)))
    assert np.flatnonzero(np.diff(evaluations[:, 0], prepend=0)).tolist() == steps


@pytest.mark.parametrize("order", [0, 1])
def test_predictions_extrapolate_in_time(order):
    cache, still = TaylorSeer(interval=4, order=order), np.ones((10, 1))
    found, _ = run(cache, Polynomial(0.3, *(-1.5,) * order), TIMES, still)
    np.testing.assert_allclose(found[:, 0], 0.3 - 1.5 * order * TIMES, rtol=1e-5, atol=1e-6)
    curved, _ = run(cache, Polynomial(0, 0, 1), TIMES, still)
    assert np.abs(curved[:, 0] - TIMES**2).max() > 0.01


def test_the_threshold_is_a_change_since_the_last_evaluation():
    residuals = np.array([1, 1.04, 1.08, 1.11, 1.2, 1.21, 1.22, 1.23, 1.24, 1.33])
    _, evaluations = run(FirstBlockCache(threshold=0.1), Polynomial(1.0), TIMES, residuals[:, None])
    assert evaluations[:, 0].tolist() == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_an_image_keeps_its_features_when_another_is_evaluated():
    """Rows 0 and 2 belong to one image, 1 and 3 to another."""
    still, moves = np.ones(10), np.linspace(1, 3, 10)
    residuals = np.stack([still, still, still, moves], axis=1)
    features, evaluations = run(
        FirstBlockCache(threshold=0.05), Polynomial(0.0, 1.0), TIMES, residuals, num_images=2
    )
    assert evaluations[-1].tolist() == [1, 10, 1, 10]
    np.testing.assert_array_equal(features[:, 0], 1.0)
    np.testing.assert_allclose(features[:, 1], TIMES, rtol=1e-6)
