"""The noise curriculum: little noise first, more once the model is proficient.

At level k of n the model sees times t <= k / n; on a rectified flow, where sigma = t, level 1 of
10 is exactly "at most 10 % noise". The state is made of arrays, so that it lives in the train
state, moves inside jit and is saved in the checkpoint.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.errors import UserError


class CurriculumState(NamedTuple):
    """Where a run stands in its curriculum."""

    level: Int[Array, ""]  # 1 .. levels
    loss: Float[Array, ""]  # smoothed, of the steps at this level
    steps: Int[Array, ""]  # taken at this level


@dataclass(frozen=True, kw_only=True)
class NoiseCurriculum:
    """Raises the level when the model is proficient at the present one.

    It is proficient when its smoothed loss has fallen below `threshold`, or after `steps_per_level`
    steps, whichever comes first. The loss is smoothed over about 1 / (1 - smoothing) steps, and is
    not trusted before that many have been taken at the level.

    Raises:
        UserError: neither rule is given, or a field is out of range.
    """

    levels: int = 10
    threshold: float | None = None
    steps_per_level: int | None = None
    smoothing: float = 0.98

    def __post_init__(self):
        if self.threshold is None and self.steps_per_level is None:
            raise UserError(
                "NoiseCurriculum would never leave its first level; give a threshold on the "
                "smoothed loss, steps_per_level, or both."
            )
        steps = 1 if self.steps_per_level is None else self.steps_per_level
        if self.levels < 1 or not 0 <= self.smoothing < 1 or steps < 1:
            raise UserError(
                f"NoiseCurriculum got levels={self.levels}, smoothing={self.smoothing}, "
                f"steps_per_level={self.steps_per_level}; give at least 1 level, a smoothing in "
                "[0, 1) and at least 1 step."
            )

    def init(self) -> CurriculumState:
        """The first level, nothing seen yet."""
        return CurriculumState(
            level=jnp.ones((), jnp.int32),
            loss=jnp.zeros((), jnp.float32),
            steps=jnp.zeros((), jnp.int32),
        )

    def max_t(self, state: CurriculumState) -> Float[Array, ""]:
        """The highest time of the present level; times drawn from (0, 1] are scaled by it."""
        return state.level.astype(jnp.float32) / self.levels

    def update(self, state: CurriculumState, loss: Float[Array, ""]) -> CurriculumState:
        """The state after a step of mean loss `loss`, which is ignored if it is not finite."""
        steps = state.steps + 1
        # A plain mean until the window is full, so that the first losses do not linger.
        weight = jnp.maximum(1.0 / steps, 1.0 - self.smoothing)
        smoothed = state.loss + weight * (loss - state.loss)

        proficient = jnp.zeros((), bool)
        if self.threshold is not None:
            full = steps * (1.0 - self.smoothing) >= 1.0
            proficient |= full & (smoothed < self.threshold)
        if self.steps_per_level is not None:
            proficient |= steps >= self.steps_per_level
        advance = proficient & (state.level < self.levels)

        after = CurriculumState(
            level=state.level + advance,
            loss=jnp.where(advance, 0.0, smoothed),
            steps=jnp.where(advance, 0, steps),
        )
        counts = jnp.isfinite(loss)
        return CurriculumState(
            *(jnp.where(counts, new, old) for new, old in zip(after, state, strict=True))
        )
