"""Communication between the hosts of a run, and conversion of arrays sharded over hosts.

Every host must call these functions, and in the same order. With one host they cost nothing.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxdiff.errors import UserError


def is_host0() -> bool:
    """Whether this is host 0, which writes files and logs for all hosts."""
    return jax.process_index() == 0


def to_host(tree: PyTree) -> PyTree:
    """Gather the arrays of a tree, sharded in any way, to whole NumPy arrays on every host."""

    def gather(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(gather, tree)


def from_host(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shard NumPy arrays that are equal on all hosts; each copies the shards of its devices."""

    def place(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)


def broadcast_text(text: str) -> str:
    """Return the text of host 0 on every host."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    if not length:
        return ""
    data = data if is_host0() else np.zeros(length, np.uint8)
    return multihost_utils.broadcast_one_to_all(data).astype(np.uint8).tobytes().decode()


def run_on_host0(action: Callable[[], None]) -> None:
    """Run `action` on host 0 while the others wait.

    Raises:
      UserError: on all hosts, if `action` raises it on host 0.
    """
    if jax.process_count() == 1:
        return action()
    message = ""
    if is_host0():
        try:
            action()
        except UserError as error:
            message = str(error)
    if message := broadcast_text(message):
        raise UserError(message)


@contextlib.contextmanager
def held_on_host0(context: AbstractContextManager[Any]) -> Iterator[None]:
    """Hold a context on host 0, such as the lock of a folder.

    Raises:
      UserError: on all hosts, if entering it raises that on host 0.
    """
    with contextlib.ExitStack() as stack:
        run_on_host0(lambda: stack.enter_context(context) and None)
        yield


def sum_over_hosts(number: int) -> int:
    """Return the sum of every host's number, on every host."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).sum())


def rows_of_host(count: int) -> slice:
    """Return the share of this host of `count` rows."""
    share = math.ceil(count / jax.process_count())
    start = min(count, share * jax.process_index())
    return slice(start, min(count, start + share))


def gather_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` rows of all hosts, in the order of `rows_of_host`."""
    if jax.process_count() == 1:
        return rows
    share = math.ceil(count / jax.process_count())
    padded = np.zeros((share, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    return gathered.reshape(-1, *rows.shape[1:])[:count]


class AnyHost:
    """Logical or of one flag per host, computed on all devices without blocking the host."""

    def __init__(self, mesh: Mesh):
        self._size = mesh.size
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, flag: bool) -> jax.Array:
        """Return whether the flag is set on any host, bool [], as an asynchronous array."""
        votes = jax.make_array_from_callback(
            (self._size,), self._sharding, lambda _: np.full(1, flag)
        )
        return self._any(votes)
