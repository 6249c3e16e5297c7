"""Time grids: ends, and agreement with the published forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow, ScaledLinear, VarianceExploding
from jaxdiff.diffusion.time_grids import (
    ConsistencyGrid,
    ExplicitGrid,
    KarrasGrid,
    LogSnrGrid,
    TimeGrid,
    TrainStepGrid,
)
from jaxdiff.errors import UserError

SCHEDULES = [
    Cosine(),
    ScaledLinear(),
    ScaledLinear(zero_terminal_snr=True),
    RectifiedFlow(),
    VarianceExploding(),
]
GRIDS = [
    TimeGrid(),
    TimeGrid(shift=3.0),
    TimeGrid(rho=2.0),
    *(KarrasGrid(schedule=schedule) for schedule in SCHEDULES),
    LogSnrGrid(schedule=RectifiedFlow()),
    ExplicitGrid(times=(1.0, 0.6, 0.1, 0.0)),
    ConsistencyGrid(),
]


def _noise_to_data(schedule, t):
    return np.asarray(schedule.sigma(t) / schedule.alpha(t), float)


@pytest.mark.parametrize(
    ("grid", "steps", "end"),
    [  # timesteps of diffusers 0.42 for 7 steps of DDIM, DPM-Solver++ and Euler
        (TrainStepGrid(offset=1), [853, 711, 569, 427, 285, 143, 1], -1),
        (TrainStepGrid(offset=1, ends_at="first_step"), [853, 711, 569, 427, 285, 143, 1], 0),
        (TrainStepGrid(offset=1, skip_last=True), [876, 751, 626, 501, 376, 251, 126], -1),
        (TrainStepGrid(spacing="trailing"), [999, 856, 713, 570, 428, 285, 142], -1),
        (TrainStepGrid(spacing="linspace"), [999, 832, 666, 500, 333, 166, 0], -1),
        (
            TrainStepGrid(spacing="linspace", skip_last=True),
            [999, 856, 714, 571, 428, 285, 143],
            -1,
        ),
        (
            TrainStepGrid(spacing="linspace", rounded=False),
            [999, 832.5, 666, 499.5, 333, 166.5, 0],
            -1,
        ),
    ],
)
def test_train_step_grids_are_those_of_diffusers(grid, steps, end):
    times = jax.jit(jax.vmap(grid, (0, None)))(jnp.arange(8), 7)
    np.testing.assert_allclose(times * 1000 - 1, [*steps, end], atol=1e-3)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_a_grid_decreases_from_one_to_zero(grid, num_steps):
    times = np.asarray(grid(jnp.arange(num_steps + 1), num_steps))
    assert times[0] == 1
    assert times[-1] == 0
    assert np.all(np.diff(times) < 0)


def test_time_grid_is_uniform_by_default():
    i = jnp.arange(11)
    np.testing.assert_allclose(TimeGrid()(i, 10), 1 - i / 10, atol=1e-6)
    np.testing.assert_allclose(TimeGrid(rho=2.0)(i, 10), (1 - i / 10) ** 2, atol=1e-6)
    assert np.all(TimeGrid(shift=3.0)(i, 10)[1:-1] > 1 - i[1:-1] / 10)


@pytest.mark.parametrize("grid", [*GRIDS, TrainStepGrid()], ids=repr)
def test_another_number_of_steps_does_not_recompile(grid):
    run = jax.jit(grid)
    for i, num_steps in itertools.product((0, 3), (5, 20)):
        np.testing.assert_allclose(run(i, num_steps), grid(i, num_steps), atol=1e-5)
    assert run._cache_size() == 1


@pytest.mark.parametrize("schedule", [Cosine(), ScaledLinear(), VarianceExploding()], ids=repr)
def test_karras_grid_is_eq_5_of_edm(schedule):
    grid = KarrasGrid(schedule=schedule, rho=7.0, first=0.99, last=0.002)
    times = grid(jnp.arange(19), 18)
    most, least = _noise_to_data(schedule, jnp.array([0.99, 0.002]))
    i = np.arange(18)
    edm = (most ** (1 / 7) + i / 17 * (least ** (1 / 7) - most ** (1 / 7))) ** 7
    np.testing.assert_allclose(_noise_to_data(schedule, times[:-1]), edm, rtol=1e-3)
    assert times[-1] == 0


@pytest.mark.parametrize("schedule", [Cosine(), ScaledLinear(), VarianceExploding()], ids=repr)
def test_log_snr_grid_is_uniform_in_log_snr(schedule):
    times = LogSnrGrid(schedule=schedule, last=0.002)(jnp.arange(20), 20)
    steps = np.diff(np.log(_noise_to_data(schedule, times)))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-2)


@pytest.mark.parametrize("kind", [KarrasGrid, LogSnrGrid])
def test_spacing_starts_at_max_sigma_where_the_ratio_is_infinite(kind):
    """At t = 1 of a rectified flow sigma / alpha is infinite."""
    schedule = RectifiedFlow()
    times = kind(schedule=schedule, max_sigma=20.0)(jnp.arange(41), 40)
    assert times[0] == 1
    assert 14 < _noise_to_data(schedule, times[1]) < 20


def test_an_explicit_grid_is_the_list_that_it_is_given():
    times = (1.0, 0.7, 0.65, 0.2, 0.0)
    grid = ExplicitGrid(times=times)
    np.testing.assert_array_equal(grid(jnp.arange(5), 4), np.float32(times))
    np.testing.assert_allclose(grid(jnp.arange(3), 2), [1.0, 0.65, 0.0], rtol=1e-6)
    np.testing.assert_allclose(grid(jnp.arange(9), 8)[1::2], [0.85, 0.675, 0.425, 0.1], rtol=1e-6)


def test_a_consistency_grid_is_that_of_diffusers():
    """Timesteps of LCMScheduler in diffusers 0.42, for 4 and 7 steps."""
    for steps in ([999, 759, 499, 259], [999, 859, 719, 579, 439, 299, 159]):
        times = ConsistencyGrid()(jnp.arange(len(steps) + 1), len(steps))
        np.testing.assert_allclose(times * 1000 - 1, [*steps, -1], atol=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TimeGrid(shift=-1.0),
        lambda: TimeGrid(rho=0.5),
        lambda: TrainStepGrid(offset=1000),
        lambda: KarrasGrid(schedule=Cosine(), rho=0.5),
        lambda: KarrasGrid(schedule=Cosine(), last=0.0),
        lambda: LogSnrGrid(schedule=Cosine(), first=0.1, last=0.2),
        lambda: ExplicitGrid(times=(1.0,)),
        lambda: ExplicitGrid(times=(1.0, 0.2, 0.3, 0.0)),
        lambda: ConsistencyGrid(distilled_steps=0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(UserError, match="expected"):
        make()
