"""Replicated weights: every device runs one program on its part of a batch.

Sampling needs no communication, so no device waits for another and each may take a different number
of steps. The result for an image does not depend on the number of devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxdiff.distributed.multihost import to_host

BY_DEVICE = PartitionSpec("data")
"""Arrays split evenly over the devices along their first axis."""


def local_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh with the single axis `data`, by default over the devices of this process."""
    chosen = jax.local_devices() if devices is None else devices
    return Mesh(np.array(chosen), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copy a tree to every device of the mesh; arrays sharded over hosts are gathered first."""

    def gather(leaf: Any) -> Any:
        over_hosts = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return to_host(leaf) if over_hosts else leaf

    return jax.device_put(jax.tree.map(gather, tree), NamedSharding(mesh, PartitionSpec()))


def per_device(call: Callable[..., Any], mesh: Mesh) -> Any:
    """Jit `call(weights, *inputs)` to run on each device with its part of the inputs.

    Inputs and outputs are trees of arrays that are split over the devices along their first axis;
    the weights are replicated.
    """

    def on_mesh(weights, *inputs):
        specs = (PartitionSpec(), *[BY_DEVICE] * len(inputs))
        # check_vma=False: loops may take a different number of steps on each device.
        program = jax.shard_map(
            call, mesh=mesh, in_specs=specs, out_specs=BY_DEVICE, check_vma=False
        )
        return program(weights, *inputs)

    return jax.jit(on_mesh)
