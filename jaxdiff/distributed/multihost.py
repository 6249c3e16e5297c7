"""What the hosts of a run tell one another, and arrays of which no host has all.

All of this is to be called by every host, in the same order; with one host it costs nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxdiff.errors import UserError


def is_host0() -> bool:
    """Whether this is the host that writes and speaks for all."""
    return jax.process_index() == 0


def to_host(tree: PyTree) -> PyTree:
    """The arrays of a tree whole, in NumPy, on every host, wherever their parts lie."""

    def whole(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def from_host(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays that every host has whole, laid out: each host hands its devices their parts."""

    def place(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(place, tree, shardings)


def broadcast_text(text: str) -> str:
    """The first host's text, on all."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    if not length:
        return ""
    data = data if is_host0() else np.zeros(length, np.uint8)
    return multihost_utils.broadcast_one_to_all(data).astype(np.uint8).tobytes().decode()


def run_on_host0(act: Callable[[], None]) -> None:
    """Has the first host do something while the others wait.

    Raises:
      UserError: on all hosts, if it does so on the first.
    """
    if jax.process_count() == 1:
        return act()
    wrong = ""
    if is_host0():
        try:
            act()
        except UserError as error:
            wrong = str(error)
    if wrong := broadcast_text(wrong):
        raise UserError(wrong)


def sum_over_hosts(number: int) -> int:
    """The sum of what the hosts give."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).sum())


class AnyHost:
    """Asks all hosts a question of which one yes is enough; counts while the devices go on."""

    def __init__(self, mesh: Mesh):
        self._size = mesh.size
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, mine: bool) -> jax.Array:
        """Whether any host says yes, bool [], as an array that need not be there yet."""
        votes = jax.make_array_from_callback(
            (self._size,), self._sharding, lambda _: np.full(1, mine)
        )
        return self._any(votes)
