"""The exponential moving average (EMA) of the weights, which sampling uses."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import BelowOne
from jaxdiff.training.post_hoc_ema import PostHocEma


@checked
@dataclass(frozen=True, kw_only=True)
class Ema:
    """ema <- d ema + (1 - d) params, with d = min(decay, (1 + step) / (10 + step)), in float32.

    The second term gives the initial weights less influence early in a run. The half-life is about
    0.69 / (1 - decay) steps: 6,900 at the default.

    Each leaf depends on the corresponding parameter alone: under jit the EMA is sharded like the
    parameters.

    Attributes:
      decay: decay of the average that is sampled and exported.
      post_hoc: further averages, from which `jaxdiff ema` makes one of any width after training.
    """

    decay: BelowOne = 0.9999
    post_hoc: PostHocEma | None = None

    def init(self, params: PyTree) -> PyTree:
        """Initialise the EMA: a float32 copy, which survives the donation of the parameters."""
        return jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)

    def update(self, ema: PyTree, params: PyTree, step: int | Int[Array, ""]) -> PyTree:
        """Update the EMA with the parameters after update `step`, counted from 0."""
        step = jnp.float32(step)
        keep = jnp.minimum(self.decay, (1 + step) / (10 + step))
        # Written as a step towards the parameters, equal weights stay bit-equal.
        return jax.tree.map(lambda e, p: e + (1 - keep) * (p.astype(jnp.float32) - e), ema, params)
