"""A curriculum over noise levels: t <= level / levels, raised during training.

On a rectified flow, where sigma = t, level 1 of 10 means at most 10 % noise. The state is a pytree
of arrays: it is part of the train state, is updated inside jit and is saved in checkpoints.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import BelowOne, Count
from jaxdiff.errors import UserError


class CurriculumState(NamedTuple):
    """The curriculum's state."""

    level: Int[Array, ""]  # 1 .. levels
    loss: Float[Array, ""]  # smoothed loss at this level
    steps: Int[Array, ""]  # steps taken at this level


@checked
@dataclass(frozen=True, kw_only=True)
class NoiseCurriculum:
    """Raises the level when the smoothed loss falls below `threshold`, or after `steps_per_level`.

    The loss is averaged over about 1 / (1 - smoothing) steps, and is compared with the threshold
    only after that many steps at the level. Where both rules are given, the first to apply counts.

    Raises:
        UserError: neither rule is given, or a field is out of range.
    """

    levels: Count = 10
    threshold: float | None = None
    steps_per_level: Count | None = None
    smoothing: BelowOne = 0.98

    def __post_init__(self):
        if self.threshold is None and self.steps_per_level is None:
            raise UserError(
                "NoiseCurriculum would never leave its first level: give threshold, "
                "steps_per_level, or both."
            )

    def init(self) -> CurriculumState:
        """Return the state before the first step."""
        return CurriculumState(
            level=jnp.ones((), jnp.int32),
            loss=jnp.zeros((), jnp.float32),
            steps=jnp.zeros((), jnp.int32),
        )

    def max_t(self, state: CurriculumState) -> Float[Array, ""]:
        """Return the highest time of the current level, a factor on times in (0, 1]."""
        return state.level.astype(jnp.float32) / self.levels

    def update(self, state: CurriculumState, loss: Float[Array, ""]) -> CurriculumState:
        """Return the state after a step with mean loss `loss`; non-finite losses are ignored."""
        steps = state.steps + 1
        # A plain mean until the window is full, so that the first losses do not dominate.
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
