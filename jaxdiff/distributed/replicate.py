"""One program that every device runs on images of its own, with all of the weights.

A batch that is drawn is no sum over devices, so none of them waits for another, and each may take
another number of steps. What it computes for an image does not depend on how many there are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxdiff.distributed.multihost import to_host

DEVICES = PartitionSpec("data")
"""Arrays of which each device has an equal share, by their first axis."""


def local_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Devices side by side; those of this process by default, for each process draws by itself."""
    chosen = jax.local_devices() if devices is None else devices
    return Mesh(np.array(chosen), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """The whole tree on every device of the mesh, also where processes share it so far."""

    def whole(leaf: Any) -> Any:
        shared = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return to_host(leaf) if shared else leaf

    return jax.device_put(jax.tree.map(whole, tree), NamedSharding(mesh, PartitionSpec()))


def per_device(call: Callable[..., Any], mesh: Mesh) -> Any:
    """`call(weights, *rows)`, jitted, on each device with its share of the rows.

    What it is given and what it gives are trees of arrays that have a device's share along their
    first axis, but for the weights.
    """

    def all_of(weights, *rows):
        specs = (PartitionSpec(), *[DEVICES] * len(rows))
        # Devices need not agree on anything: loops may be of different lengths.
        program = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=DEVICES, check_vma=False)
        return program(weights, *rows)

    return jax.jit(all_of)
