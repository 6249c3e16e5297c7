"""The denoising objective: equal losses in every space, and noise that depends on the image."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.losses import MinSNR, SigmoidWeighting, UniformWeighting
from jaxdiff.diffusion.objectives import Denoising, LossInputs
from jaxdiff.diffusion.process import Prediction, add_noise, from_x0_eps
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow, VarianceExploding
from jaxdiff.diffusion.time_sampling import LogitNormal, Uniform
from jaxdiff.errors import UserError

PREDICTIONS = get_args(Prediction)


@pytest.fixture
def x0():
    return jax.random.uniform(jax.random.key(0), (8, 4, 4, 3), minval=-1, maxval=1)


@pytest.fixture
def eps():
    return jax.random.normal(jax.random.key(1), (8, 4, 4, 3))


def outputs_of(objective, network, x0, key, **inputs):
    """The outputs of an objective for a network (x_t, t) that predicts noise."""
    settings = {"prediction": "eps", "schedule": Cosine(), "cond": None} | inputs
    model = lambda x_t, t, cond, next_t=None: network(x_t, t)  # noqa: E731
    keys = RowKeys.whole(key, len(x0))
    return objective.loss(LossInputs(model=model, x0=x0, keys=keys, **settings))


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow(), VarianceExploding()], ids=repr)
@pytest.mark.parametrize("weighting", [MinSNR(), SigmoidWeighting(bias=1.0)], ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_weighted_loss_is_the_same_in_every_space(schedule, weighting, prediction, x0, eps):
    output, t = jnp.flip(x0) + 0.3, jnp.linspace(0.2, 0.9, 8)

    def loss(space):
        objective = Denoising(loss_space=space, weighting=weighting, floor=1e-6)
        return objective.weighted_error(prediction, schedule, output, x0, eps, t)

    for space in PREDICTIONS:
        np.testing.assert_allclose(loss(space), loss(prediction), rtol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("space", PREDICTIONS)
def test_the_truth_costs_nothing(prediction, space, x0, eps):
    objective = Denoising(loss_space=space, weighting=MinSNR())
    schedule, t = Cosine(), jnp.linspace(0.0, 1.0, 8)
    truth = from_x0_eps(prediction, x0, eps, schedule.alpha(t), schedule.sigma(t))
    error = objective.weighted_error(prediction, schedule, truth, x0, eps, t)
    np.testing.assert_array_equal(error, 0)


def test_x0_with_velocity_loss_is_jit(x0, eps):
    """JiT compares (x_t - x0) / max(t, 0.05), predicted and true, unweighted."""
    t = jnp.array([0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    output = 0.5 * x0
    x_t = add_noise(RectifiedFlow(), x0, eps, t)
    clipped = jnp.maximum(t, 0.05).reshape(-1, 1, 1, 1)
    expected = jnp.mean(((x_t - output) / clipped - (x_t - x0) / clipped) ** 2, axis=(1, 2, 3))
    objective = Denoising(loss_space="velocity")
    # At the floor the two differ by alpha + sigma = 1 against alpha + max(sigma, 0.05).
    actual = objective.weighted_error("x0", RectifiedFlow(), output, x0, eps, t)
    np.testing.assert_allclose(actual[1:], expected[1:], rtol=1e-4)
    np.testing.assert_allclose(actual[0], expected[0], rtol=0.1)


def test_the_default_is_an_unweighted_loss_in_the_space_of_the_prediction(x0):
    """The best constant, zero, costs the variance of the noise: one."""
    zero = lambda x_t, t: jnp.zeros_like(x_t)  # noqa: E731
    losses = outputs_of(Denoising(), zero, x0, jax.random.key(0))
    assert jnp.mean(losses.loss) == pytest.approx(1, abs=0.2)
    assert isinstance(Denoising().weighting, UniformWeighting)


def test_images_have_noise_of_their_own_and_keys_decide_it(x0):
    def seen(key, batch):
        inputs = []

        def network(x_t, t):
            inputs.append(x_t)
            return x_t

        only_noise = LogitNormal(mean=30.0)  # t = 1 for every image
        outputs_of(Denoising(times=only_noise), network, x0[:batch], key)
        return np.asarray(inputs[0])

    first = seen(jax.random.key(0), 8)
    assert len({image.tobytes() for image in first}) == 8
    np.testing.assert_array_equal(seen(jax.random.key(0), 4), first[:4])
    assert not np.allclose(seen(jax.random.key(1), 8), first)


def test_max_t_bounds_the_noise_without_recompiling(x0):
    traces = []

    @jax.jit
    def times(max_t):
        traces.append(None)
        network = lambda x_t, t: x_t  # noqa: E731
        objective = Denoising(times=Uniform())
        return outputs_of(objective, network, x0, jax.random.key(0), max_t=max_t).t

    for max_t in (0.1, 0.2, 1.0):
        t = times(jnp.float32(max_t))
        assert jnp.all((t > 0) & (t <= max_t))
        assert jnp.max(t) > 0.8 * max_t
    assert len(traces) == 1


def test_half_precision_outputs_are_compared_in_full(x0):
    network = lambda x_t, t: x_t.astype(jnp.bfloat16)  # noqa: E731
    losses = outputs_of(Denoising(), network, x0.astype(jnp.bfloat16), jax.random.key(0))
    assert losses.loss.dtype == jnp.float32


def test_offset_noise_shifts_whole_channels():
    """Zero x0 and a network that answers 0: the loss is the mean square of the noise."""
    x0, zero = jnp.zeros((4000, 4, 4, 2)), lambda x, t: jnp.zeros_like(x)
    plain, offset = (
        outputs_of(Denoising(noise_offset=scale), zero, x0, jax.random.key(0)).loss.mean()
        for scale in (0.0, 0.5)
    )
    assert float(plain) == pytest.approx(1.0, abs=0.02)
    assert float(offset) == pytest.approx(1.25, abs=0.04)

    noises = []
    record = lambda x, t: noises.append(x) or x  # noqa: E731
    outputs_of(Denoising(noise_offset=0.5), record, jnp.zeros((500, 8, 8, 1)), jax.random.key(1))
    x = noises[0] / jnp.std(noises[0])
    # The mean over 64 pixels has a variance of 1/64 without, and of (1/64 + 1/4) / (1 + 1/4) with.
    assert float(jnp.var(x.mean(axis=(1, 2, 3)))) == pytest.approx(0.2125, rel=0.25)


def test_rows_are_weighted(x0):
    zero = lambda x_t, t: jnp.zeros_like(x_t)  # noqa: E731
    weights = jnp.arange(8.0)
    plain = outputs_of(Denoising(), zero, x0, jax.random.key(0))
    weighted = outputs_of(Denoising(), zero, x0, jax.random.key(0), row_weights=weights)
    np.testing.assert_allclose(weighted.loss, weights * plain.loss, rtol=1e-6)
    np.testing.assert_array_equal(weighted.t, plain.t)


def test_the_conditioning_reaches_the_model_and_the_state_is_returned(x0):
    seen = []

    def model(x_t, t, cond, next_t=None):
        seen.append((cond, next_t))
        return x_t

    state, cond = {"count": jnp.zeros(())}, {"tokens": jnp.ones((8, 2))}
    outputs = Denoising().loss(
        LossInputs(
            model=model,
            prediction="x0",
            schedule=RectifiedFlow(),
            x0=x0,
            cond=cond,
            keys=RowKeys.whole(jax.random.key(0), len(x0)),
            state=state,
        )
    )
    assert seen == [(cond, None)]
    assert outputs.state is state


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match=r"Denoising\.floor is"):
        Denoising(floor=0.0)
    with pytest.raises(UserError, match="noise_offset is -1"):
        dataclasses.replace(Denoising(), noise_offset=-1.0)
