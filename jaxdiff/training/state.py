"""The state of a run at one step, and its fingerprint."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from jaxdiff.distributed.multihost import to_host

# Fields that the fingerprint covers, in order.
FINGERPRINTED = ("step", "params", "ema", "averages", "opt_state")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step changes; a checkpoint contains it.

    Attributes:
      step: number of steps taken.
      key: of the run; step n uses `fold_in(key, n)`.
      params: float32 masters.
      ema: their exponential moving average, of the same structure.
      averages: those for post-hoc EMA, by name; {} where the recipe has none.
      opt_state: of the optimizer.
      task_state: state of the task, such as the noise curriculum.
      nonfinite: skipped updates: consecutive ones until now, and all.
    """

    step: Int[Array, ""] | Any
    key: Key[Array, ""] | Any
    params: PyTree
    ema: PyTree
    averages: PyTree = dataclasses.field(default_factory=dict)
    opt_state: PyTree
    task_state: PyTree
    nonfinite: PyTree

    def replace(self, **changes) -> "TrainState":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def fingerprint(state: TrainState) -> str:
    """Return the SHA-256, in hex, over the bytes of step, params, averages and optimizer state.

    Leaves enter in the order of their tree, with path, type and shape: equal fingerprints mean
    bit-equal states. Sharded arrays are gathered on every host, so all hosts must call it.
    """
    digest = hashlib.sha256()
    for name in FINGERPRINTED:
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(state, name)):
            value = to_host(leaf)
            digest.update(f"{name}{jax.tree_util.keystr(path)}{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def no_skips() -> dict[str, jax.Array]:
    """Return the initial counts of `TrainState.nonfinite`."""
    return {"in_a_row": jnp.zeros((), jnp.int32), "total": jnp.zeros((), jnp.int32)}
