"""The moving average of the weights, which is what samples are drawn with."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from jaxdiff.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Ema:
    """ema <- d ema + (1 - d) params, with d = min(decay, (1 + step) / (10 + step)), in float32.

    The second term lets the average forget the initial weights early in a run. Half of what it
    holds is younger than about 0.69 / (1 - decay) steps: 6,900 at the default.

    Each leaf is computed from the leaf of the same place alone, so that under jit the average is
    sharded as the parameters are.
    """

    decay: float = 0.9999

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise UserError(f"Ema: decay must be in [0, 1), 0 for no averaging; got {self.decay}.")

    def init(self, params: PyTree) -> PyTree:
        """The average at step 0: a float32 copy, safe beside parameters that are donated."""
        return jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)

    def update(self, ema: PyTree, params: PyTree, step: int | Int[Array, ""]) -> PyTree:
        """The average after `params` became those of update `step`, counted from 0."""
        step = jnp.float32(step)
        keep = jnp.minimum(self.decay, (1 + step) / (10 + step))
        # As a step towards the parameters: equal weights then stay equal to the last bit.
        return jax.tree.map(lambda e, p: e + (1 - keep) * (p.astype(jnp.float32) - e), ema, params)
