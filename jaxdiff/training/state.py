"""What a run is at one step, and the fingerprint that tells two such states apart."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from jaxdiff.distributed.multihost import to_host

# Fields of a state that its fingerprint covers, in this order.
FINGERPRINTED = ("step", "params", "ema", "opt_state")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step changes; a checkpoint is this and the place in the data.

    Attributes:
      step: number of steps taken.
      key: of the run; step n draws from `fold_in(key, n)`.
      params: float32 masters.
      ema: their exponential moving average, of the same structure.
      opt_state: of the optimizer.
      task_state: what the task itself carries along, such as the noise curriculum.
      nonfinite: updates skipped in a row until now, and in all.
    """

    step: Int[Array, ""] | Any
    key: Key[Array, ""] | Any
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    task_state: PyTree
    nonfinite: PyTree

    def replace(self, **changes) -> "TrainState":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def fingerprint(state: TrainState) -> str:
    """SHA-256, in hex, over the bytes of step, params, EMA and optimizer state.

    Leaves are taken in the order of their tree, each with its path, type and shape, so that two
    states agree only if they are equal bit for bit. Gathers sharded arrays, one after the other,
    on every host; so all hosts call it.
    """
    digest = hashlib.sha256()
    for name in FINGERPRINTED:
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(state, name)):
            value = to_host(leaf)
            digest.update(f"{name}{jax.tree_util.keystr(path)}{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def no_skips() -> dict[str, jax.Array]:
    """The counts of `TrainState.nonfinite` at the start."""
    return {"in_a_row": jnp.zeros((), jnp.int32), "total": jnp.zeros((), jnp.int32)}
