"""Consistency distillation on Gaussian data, whose probability-flow ODE is known exactly.

For x0 ~ N(0, c^2), x_t is N(0, c^2 alpha^2 + sigma^2), and the flow keeps every quantile:
x_s = x_t std(s) / std(t).
"""

import dataclasses
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.distillation import ConsistencyDistillation, move, path_weight
from jaxdiff.diffusion.objectives import LossInputs
from jaxdiff.diffusion.process import Prediction, from_x0_eps, over_images
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow, ScaledLinear
from jaxdiff.diffusion.time_grids import ConsistencyGrid, TimeGrid
from jaxdiff.errors import UserError
from jaxdiff.sampling.loop import noise_from_seeds, sample
from jaxdiff.sampling.solver import stateless
from jaxdiff.sampling.solvers_ode import DDIM

C = 0.6
SCHEDULES = [RectifiedFlow(), ScaledLinear(), Cosine()]
PREDICTIONS = get_args(Prediction)
ROWS = 16


def std(schedule, t):
    return jnp.hypot(C * schedule.alpha(t), schedule.sigma(t))


def denoiser(schedule, scale=1.0):
    """E[x0 | x_t], times `scale`, in x0."""

    def x0(x, t):
        gain = C**2 * schedule.alpha(t) / std(schedule, t) ** 2
        return scale * over_images(gain) * x

    return x0


def exact_student(schedule, end_of):
    """F of eq. 1 that moves x_t along the exact path to the end of its segment."""

    def x0(x, t):
        s = end_of(t)
        shrink = schedule.sigma(s) / schedule.sigma(t)
        gain = (std(schedule, s) / std(schedule, t) - shrink) / (
            schedule.alpha(s) - schedule.alpha(t) * shrink
        )
        return over_images(gain) * x

    return x0


def end_of_segment(objective):
    grid, segments = objective.grid, objective.segments
    ends = grid(jnp.arange(segments + 1), segments, 1)
    return lambda t: jnp.max(jnp.where(ends < t[:, None] - 1e-5, ends, 0.0), axis=1)


def predictor(schedule, prediction, x0, seen=None):
    """A network that predicts x0(x, t) in another form; `seen` collects its inputs."""

    def network(x, t, cond, next_t=None):
        if seen is not None:
            seen.append((x, t, cond))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        estimate = x0(x, t) if cond is None else cond(x, t)
        eps = (x - over_images(alpha) * estimate) / over_images(jnp.maximum(sigma, 1e-6))
        return from_x0_eps(prediction, estimate, eps, alpha, sigma)

    return network


def inputs_of(schedule, prediction, *, student, teacher, ema, rows=ROWS, **changes):
    x0 = C * jax.random.normal(jax.random.key(0), (rows, 2, 2, 1))
    networks = (predictor(schedule, prediction, x0) for x0 in (student, teacher, ema))
    model, teaching, average = networks
    inputs = LossInputs(
        model=model,
        prediction=prediction,
        schedule=schedule,
        x0=x0,
        cond=None,
        uncond=None,
        keys=RowKeys.whole(jax.random.key(1), rows),
        teacher=teaching,
        ema=average,
    )
    return inputs._replace(**changes)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("schedule", "segments"), list(zip(SCHEDULES, (4, 1, 2), strict=True)))
def test_the_exact_map_costs_nothing_and_any_other_something(schedule, prediction, segments):
    """Up to the DDIM steps of the teacher, of first order: twice the steps, a quarter the loss."""

    def loss_of(steps, factor=1.0):
        objective = ConsistencyDistillation(steps=steps, segments=segments, guidance_scale=1.0)
        exact = exact_student(schedule, end_of_segment(objective))
        inputs = inputs_of(
            schedule,
            prediction,
            student=lambda x, t: factor * exact(x, t),
            teacher=denoiser(schedule),
            ema=exact,
            rows=64,
        )
        return float(objective.loss(inputs).loss.mean())

    coarse, fine = loss_of(200), loss_of(400)
    assert coarse < 1e-4
    assert fine < 0.5 * coarse or fine < 1e-8
    assert loss_of(400, factor=1.1) > 100 * fine


@pytest.mark.parametrize(("schedule", "segments"), list(zip(SCHEDULES, (4, 1, 2), strict=True)))
def test_the_optimal_student_is_the_teachers_ddim_in_few_steps(schedule, segments):
    """A table of gains, made by eq. 2 from the last time backwards, samples what 24 steps do."""
    objective = ConsistencyDistillation(grid=TimeGrid(shift=2.0), segments=segments)
    steps, per_segment = objective.steps, objective.steps // segments
    times = objective.grid(jnp.arange(steps + 1), steps, 1)
    teacher, ones = denoiser(schedule), jnp.ones((1, 1, 1, 1))
    gains = [jnp.zeros(())] * (steps + 1)
    for i in reversed(range(steps)):
        t, u = times[i : i + 1], times[i + 1 : i + 2]
        s = times[(i // per_segment + 1) * per_segment][None]
        own = teacher(ones, t)
        x_u = move(schedule, ones, own, t, u)
        w = over_images(path_weight(schedule, t, u, s))
        gains[i] = jnp.where(w == 1, own, w * own + (1 - w) * gains[i + 1] * x_u).reshape(())
    table = jnp.stack(gains)

    def student(x, t):
        return table[jnp.argmin(jnp.abs(times - t))] * x

    seeds = jnp.arange(3)
    noise = noise_from_seeds(seeds, (2, 2, 1))
    full, few = (
        sample(stateless(f), DDIM(), schedule, objective.grid, n, noise, seeds).images
        for f, n in ((lambda x, t: teacher(x, t[None]), steps), (student, segments))
    )
    np.testing.assert_allclose(few, full, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_target_at_the_end_of_a_path_is_the_guided_teacher(schedule):
    """With as many segments as steps, every u is the end: the average does not matter."""
    objective = ConsistencyDistillation(steps=8, segments=8, guidance_scale=3.0)
    given, absent = denoiser(schedule), denoiser(schedule, 0.5)
    inputs = inputs_of(
        schedule,
        "x0",
        student=lambda x, t: absent(x, t) + 3.0 * (given(x, t) - absent(x, t)),
        teacher=given,
        ema=lambda x, t: jnp.full_like(x, jnp.nan),
        uncond=absent,
    )
    np.testing.assert_allclose(objective.loss(inputs).loss, 0, atol=1e-10)
    unguided = inputs_of(schedule, "x0", student=given, teacher=given, ema=given, uncond=absent)
    assert float(objective.loss(unguided).loss.max()) > 1e-3


def test_each_network_sees_its_time_and_its_conditioning():
    schedule, seen = RectifiedFlow(), {"model": [], "teacher": [], "ema": []}
    objective = ConsistencyDistillation(steps=6, segments=2, guidance_scale=2.0)
    x0 = denoiser(schedule)
    inputs = inputs_of(schedule, "x0", student=x0, teacher=x0, ema=x0)
    networks = {name: predictor(schedule, "x0", x0, calls) for name, calls in seen.items()}
    t = objective.loss(inputs._replace(**networks, uncond=denoiser(schedule, 0.5))).t
    [(x_t, at_t, cond)] = seen["model"]
    (_, _, given), (_, _, absent) = seen["teacher"]
    [(x_u, at_u, _)] = seen["ema"]
    assert cond is None
    assert given is None
    assert absent is not None
    np.testing.assert_array_equal(at_t, t)
    np.testing.assert_allclose(at_t - at_u, 1 / 6, rtol=1e-5)
    for x, _, _ in seen["teacher"]:
        np.testing.assert_array_equal(x, x_t)
    guided = 1.5 * x0(x_t, at_t)  # 0.5 + 2 (1 - 0.5)
    np.testing.assert_allclose(x_u, move(schedule, x_t, guided, at_t, at_u), rtol=1e-5)


@pytest.mark.parametrize("segments", [1, 2])
def test_the_target_of_several_steps_of_the_teacher_is_their_mean(segments):
    """The step of eq. 1 with the target arrives where DDIM of the teacher does."""
    schedule, teacher, ones = RectifiedFlow(), denoiser(RectifiedFlow()), jnp.ones((1, 1, 1, 1))
    k = 6 // segments
    fine = TimeGrid()(jnp.arange(7), 6, 1)
    x = ones
    for t, u in itertools.pairwise(fine[: k + 1].reshape(-1, 1)):
        x = move(schedule, x, teacher(x, t), t, u)
    objective = ConsistencyDistillation(
        steps=segments, segments=segments, teacher_steps=k, guidance_scale=1.0
    )
    times = [fine[j : j + 1] for j in range(k + 1)]
    inputs = inputs_of(schedule, "x0", student=teacher, teacher=teacher, ema=None)
    target = objective._target(inputs, ones, times, times[-1])
    np.testing.assert_allclose(move(schedule, ones, target, times[0], times[-1]), x, rtol=1e-5)


@pytest.mark.parametrize("huber", [None, 0.001, 0.5])
def test_gradients_reach_the_student_alone(huber):
    schedule = RectifiedFlow()
    objective = ConsistencyDistillation(steps=8, segments=2, huber=huber)
    x0 = denoiser(schedule)

    def loss(gains):
        student, teacher, ema = (lambda x, t, g=g: g * x0(x, t) for g in gains)
        inputs = inputs_of(schedule, "x0", student=student, teacher=teacher, ema=ema)
        return objective.loss(inputs).loss.mean()

    of_student, of_teacher, of_ema = jax.grad(loss)(jnp.array([0.5, 1.0, 1.0]))
    assert of_student < 0
    assert of_teacher == of_ema == 0


def test_the_pseudo_huber_loss_is_linear_far_away_and_quadratic_near():
    schedule, zero = RectifiedFlow(), lambda x, t: jnp.zeros_like(x)

    def loss(offset, huber):
        student = lambda x, t: jnp.full_like(x, offset)  # noqa: E731
        inputs = inputs_of(schedule, "x0", student=student, teacher=zero, ema=zero)
        return float(ConsistencyDistillation(huber=huber).loss(inputs).loss.mean())

    assert loss(3.0, None) == pytest.approx(9.0, rel=1e-5)
    assert loss(3.0, 0.001) == pytest.approx(2.999, rel=1e-5)
    assert loss(0.01, 1.0) == pytest.approx(0.01**2 / 2, rel=1e-2)


def test_the_loss_of_an_image_is_independent_of_the_others():
    schedule, objective = RectifiedFlow(), ConsistencyDistillation()
    x0 = denoiser(schedule)
    whole = inputs_of(schedule, "x0", student=lambda x, t: 0.5 * x, teacher=x0, ema=x0)
    expected = objective.loss(whole)
    rows = jnp.array([3, 7, 12])
    keys = dataclasses.replace(whole.keys, rows=rows)
    part = objective.loss(whole._replace(x0=whole.x0[rows], keys=keys))
    np.testing.assert_allclose(part.loss, expected.loss[rows], rtol=1e-5)
    np.testing.assert_array_equal(part.t, expected.t[rows])
    weights = jnp.arange(float(ROWS))
    weighted = objective.loss(whole._replace(row_weights=weights))
    np.testing.assert_allclose(weighted.loss, weights * expected.loss, rtol=1e-6)


@pytest.mark.parametrize("grid", [TimeGrid(shift=3.0), ConsistencyGrid()], ids=repr)
def test_times_are_those_of_the_grid(grid):
    objective = ConsistencyDistillation(grid=grid, steps=50, segments=1)
    (t, u), s = objective.times(RowKeys.whole(jax.random.key(0), 500), 1.0, 1)
    times = np.asarray(grid(jnp.arange(51), 50, 1))
    np.testing.assert_array_equal(np.unique(t), np.unique(times[:-1]))
    index = np.argmin(np.abs(times[:, None] - np.asarray(t)), axis=0)
    np.testing.assert_array_equal(u, times[index + 1])
    np.testing.assert_array_equal(s, 0)
    (low, _), _ = objective.times(RowKeys.whole(jax.random.key(0), 500), 0.41, 1)
    assert float(low.max()) <= 0.41
    assert len(np.unique(low)) == np.sum(times[:-1] <= 0.41)


def test_segments_that_do_not_divide_the_steps_are_refused():
    with pytest.raises(UserError, match="expected a multiple of segments"):
        ConsistencyDistillation(steps=10, segments=4)
