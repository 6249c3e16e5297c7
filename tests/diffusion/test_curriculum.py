"""The curriculum raises its level exactly when a rule applies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.curriculum import NoiseCurriculum
from jaxdiff.errors import UserError


def _levels(curriculum, losses):
    """The level after each loss, all inside one jitted scan."""

    def step(state, loss):
        state = curriculum.update(state, loss)
        return state, state.level

    return np.asarray(jax.jit(lambda x: jax.lax.scan(step, curriculum.init(), x)[1])(losses))


def test_starts_at_a_tenth_of_the_noise_and_ends_at_all_of_it():
    curriculum = NoiseCurriculum(steps_per_level=3)
    state = curriculum.init()
    seen = []
    for _ in range(40):
        seen.append(round(float(curriculum.max_t(state)), 4))
        state = curriculum.update(state, jnp.asarray(1.0))
    expected = [k / 10 for k in range(1, 11) for _ in range(3)] + [1.0] * 10
    np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_stays_while_the_loss_is_above_the_threshold():
    assert np.all(_levels(NoiseCurriculum(threshold=0.5), jnp.full(300, 0.51)) == 1)


def test_moves_on_once_the_smoothed_loss_is_below_the_threshold():
    curriculum = NoiseCurriculum(threshold=0.5, smoothing=0.9)
    losses = jnp.concatenate([jnp.full(50, 1.0), jnp.full(50, 0.0)])
    levels = _levels(curriculum, losses)
    assert np.all(levels[:50] == 1)
    # 0.9^k < 0.5 first at k = 7: the 57th loss brings the smoothed one below the threshold.
    assert levels[55] == 1
    assert levels[56] == 2


def test_each_level_starts_a_new_average():
    levels = _levels(NoiseCurriculum(threshold=0.5, smoothing=0.75), jnp.zeros(20))
    np.testing.assert_array_equal(levels, 1 + np.arange(1, 21) // 4)


def test_a_low_first_loss_does_not_raise_the_level():
    losses = jnp.array([0.0] + [1.0] * 50)
    assert np.all(_levels(NoiseCurriculum(threshold=0.5, smoothing=0.9), losses) == 1)


def test_either_rule_moves_on_when_both_are_given():
    curriculum = NoiseCurriculum(threshold=0.5, steps_per_level=20, smoothing=0.9)
    assert _levels(curriculum, jnp.full(19, 1.0))[-1] == 1
    assert _levels(curriculum, jnp.full(20, 1.0))[-1] == 2
    assert _levels(curriculum, jnp.full(10, 0.0))[-1] == 2


def test_a_loss_that_is_not_finite_changes_nothing():
    curriculum = NoiseCurriculum(threshold=0.5)
    before = curriculum.update(curriculum.init(), jnp.asarray(0.7))
    for bad in (jnp.nan, jnp.inf):
        after = curriculum.update(before, jnp.asarray(bad))
        jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"threshold": 0.5, "levels": 0},
        {"threshold": 0.5, "smoothing": 1.0},
        {"steps_per_level": 0},
    ],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(UserError, match=r"expected|give threshold"):
        NoiseCurriculum(**fields)
