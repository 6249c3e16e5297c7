"""What the one training loop asks of a thing that can be trained."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree, UInt8

from jaxdiff.data.tokenizer import Tokenizer

Batch = Mapping[str, Any]  # as `jaxdiff.data.loader.make_dataset` has it
Metrics = dict[str, jax.Array]

SUM, COUNT = "_sum", "_count"
"""A metric x_sum is logged as x: its total since the last line over that of x_count."""


class Pretrained(NamedTuple):
    """A trained part that a task takes over: where it lies, and how its module is built."""

    folder: str | None  # of a run or bundle, or shipped:NAME; None: it stays as drawn by `build`
    part: tuple[str, ...]  # of that model's parameters; () for all of them
    build: Callable[[], nnx.Module]


@runtime_checkable
class Task(Protocol):
    """A model, its loss, and whatever it carries along from step to step.

    A task inherits from this, and says no more than what it has: by default all starts as drawn,
    nothing is taken from elsewhere, and nothing is carried along.

    Parameters of frozen parts come as a tree of their own, {name: params}, so that they are neither
    trained nor saved with each checkpoint.
    """

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module whose parameters are trained, freshly drawn."""
        ...

    def frozen(self) -> dict[str, Pretrained]:
        """The parts that are used as they are, by name."""
        return {}

    def start(self) -> dict[str, Pretrained]:
        """The parts of `build()`'s module that do not start as drawn, by their name in it."""
        return {}

    def derive(self, frozen: PyTree, tokenizer: Tokenizer) -> dict[str, PyTree]:
        """Those that start as something made of the frozen parts, as arrays of the host."""
        return {}

    def init_state(self) -> PyTree:
        """What is carried along at the start, a tree of arrays; () for nothing."""
        return ()

    def loss(
        self, model: Any, frozen: PyTree, batch: Batch, key: Key[Array, ""], task_state: PyTree
    ) -> tuple[Float[Array, ""], Metrics]:
        """The mean loss over the batch, float32, and what is to be logged, the loss as "loss"."""
        ...

    def next_state(self, task_state: PyTree, metrics: Metrics) -> PyTree:
        """What is carried to the next step, given this step's metrics."""
        return task_state


def from_uint8(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Pixels 0..255 to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1
