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
    FlowGrid,
    KarrasGrid,
    LogSnrGrid,
    TimeGrid,
    TrainStepGrid,
)
from jaxdiff.diffusion.time_shifts import EmpiricalShift, TokenShift
from jaxdiff.errors import UserError

TOKENS = 4096
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
    FlowGrid(shift=3.0),
    FlowGrid(token_shift=TokenShift(form="linear")),
    FlowGrid(token_shift=EmpiricalShift(), terminal=0.02),
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
    times = jax.jit(jax.vmap(grid, (0, None, None)), static_argnums=2)(jnp.arange(8), 7, TOKENS)
    np.testing.assert_allclose(times * 1000 - 1, [*steps, end], atol=1e-3)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_a_grid_decreases_from_one_to_zero(grid, num_steps):
    times = np.asarray(grid(jnp.arange(num_steps + 1), num_steps, TOKENS))
    assert times[0] == 1
    assert times[-1] == 0
    assert np.all(np.diff(times) < 0)


def test_time_grid_is_uniform_by_default():
    i = jnp.arange(11)
    np.testing.assert_allclose(TimeGrid()(i, 10, TOKENS), 1 - i / 10, atol=1e-6)
    np.testing.assert_allclose(TimeGrid(rho=2.0)(i, 10, TOKENS), (1 - i / 10) ** 2, atol=1e-6)
    assert np.all(TimeGrid(shift=3.0)(i, 10, TOKENS)[1:-1] > 1 - i[1:-1] / 10)


@pytest.mark.parametrize("grid", [*GRIDS, TrainStepGrid()], ids=repr)
def test_another_number_of_steps_does_not_recompile(grid):
    run = jax.jit(grid, static_argnums=2)
    for i, num_steps in itertools.product((0, 3), (5, 20)):
        np.testing.assert_allclose(run(i, num_steps, TOKENS), grid(i, num_steps, TOKENS), atol=1e-5)
    assert run._cache_size() == 1


@pytest.mark.parametrize("schedule", [Cosine(), ScaledLinear(), VarianceExploding()], ids=repr)
def test_karras_grid_is_eq_5_of_edm(schedule):
    grid = KarrasGrid(schedule=schedule, rho=7.0, first=0.99, last=0.002)
    times = grid(jnp.arange(19), 18, TOKENS)
    most, least = _noise_to_data(schedule, jnp.array([0.99, 0.002]))
    i = np.arange(18)
    edm = (most ** (1 / 7) + i / 17 * (least ** (1 / 7) - most ** (1 / 7))) ** 7
    np.testing.assert_allclose(_noise_to_data(schedule, times[:-1]), edm, rtol=1e-3)
    assert times[-1] == 0


@pytest.mark.parametrize("schedule", [Cosine(), ScaledLinear(), VarianceExploding()], ids=repr)
def test_log_snr_grid_is_uniform_in_log_snr(schedule):
    times = LogSnrGrid(schedule=schedule, last=0.002)(jnp.arange(20), 20, TOKENS)
    steps = np.diff(np.log(_noise_to_data(schedule, times)))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-2)


@pytest.mark.parametrize("kind", [KarrasGrid, LogSnrGrid])
def test_spacing_starts_at_max_sigma_where_the_ratio_is_infinite(kind):
    """At t = 1 of a rectified flow sigma / alpha is infinite."""
    schedule = RectifiedFlow()
    times = kind(schedule=schedule, max_sigma=20.0)(jnp.arange(41), 40, TOKENS)
    assert times[0] == 1
    assert 14 < _noise_to_data(schedule, times[1]) < 20


def test_an_explicit_grid_is_the_list_that_it_is_given():
    times = (1.0, 0.7, 0.65, 0.2, 0.0)
    grid = ExplicitGrid(times=times)
    np.testing.assert_array_equal(grid(jnp.arange(5), 4, TOKENS), np.float32(times))
    np.testing.assert_allclose(grid(jnp.arange(3), 2, TOKENS), [1.0, 0.65, 0.0], rtol=1e-6)
    np.testing.assert_allclose(
        grid(jnp.arange(9), 8, TOKENS)[1::2], [0.85, 0.675, 0.425, 0.1], rtol=1e-6
    )


def test_a_consistency_grid_is_that_of_diffusers():
    """Timesteps of LCMScheduler in diffusers 0.42, for 4 and 7 steps."""
    for steps in ([999, 759, 499, 259], [999, 859, 719, 579, 439, 299, 159]):
        times = ConsistencyGrid()(jnp.arange(len(steps) + 1), len(steps), TOKENS)
        np.testing.assert_allclose(times * 1000 - 1, [*steps, -1], atol=1e-3)


def test_a_flow_grid_of_a_constant_shift_is_the_time_grid_of_that_shift():
    i = jnp.arange(9)
    expected = TimeGrid(shift=3.0)(i, 8, TOKENS)
    np.testing.assert_allclose(FlowGrid(shift=3.0)(i, 8, TOKENS), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825), (16, 0.459375)]
)
def test_a_token_shift_is_linear_in_tokens(tokens, mu):
    i = jnp.arange(4)
    grid = FlowGrid(token_shift=TokenShift())
    expected = TimeGrid(shift=float(np.exp(mu)))(i, 4, TOKENS)
    np.testing.assert_allclose(grid(i, 4, tokens), expected, atol=1e-6)
    grid = FlowGrid(shift=2.0, token_shift=TokenShift(form="linear"))
    np.testing.assert_allclose(grid(i, 4, tokens), TimeGrid(shift=2 * mu)(i, 4, 1), atol=1e-6)


def test_the_empirical_shift_is_linear_in_steps_for_few_tokens_alone():
    def mu(tokens, steps):
        return float(jnp.log(EmpiricalShift()(tokens, steps)))

    assert mu(4096, 10) == pytest.approx(8.73809524e-5 * 4096 + 1.89833333)
    assert mu(4096, 200) == pytest.approx(1.6927e-4 * 4096 + 0.45666666)
    assert mu(4096, 105) == pytest.approx((mu(4096, 10) + mu(4096, 200)) / 2)
    assert mu(4301, 4) == mu(4301, 50) == pytest.approx(1.6927e-4 * 4301 + 0.45666666)


def test_times_are_stretched_to_the_terminal():
    i = jnp.arange(9)
    plain, stretched = FlowGrid(shift=3.0), FlowGrid(shift=3.0, terminal=0.1)
    times = np.asarray(stretched(i, 8, TOKENS))
    assert times[7] == pytest.approx(0.1)
    ratios = (1 - times[1:8]) / (1 - np.asarray(plain(i, 8, TOKENS))[1:8])
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)
    np.testing.assert_array_equal(stretched(jnp.arange(2), 1, TOKENS), [1, 0])


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
        lambda: FlowGrid(shift=0.0),
        lambda: FlowGrid(terminal=1.0),
        lambda: TokenShift(base_tokens=4096),
        lambda: TokenShift(most=0.4),
        lambda: TokenShift(base=0.01, form="linear"),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(UserError, match="expected"):
        make()
