"""Replicas of a model for sampling: each is whole on one device, or sharded over a group of them.

Replicas need no communication. On a device each, none waits for another, and each may take a
different number of steps on its part of a batch. The result for an image does not depend on their
number.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxdiff.distributed.mesh import AXES, REPLICAS, REPLICATED, MeshConfig, make_mesh, num_replicas
from jaxdiff.distributed.multihost import from_host, to_host
from jaxdiff.distributed.sharding import ParamAxes, replicated, state_shardings
from jaxdiff.errors import UserError

BY_REPLICA = PartitionSpec(REPLICAS)
"""Arrays split evenly over the replicas along their first axis."""


def local_mesh(devices: Sequence[Any] | None = None, config: MeshConfig = REPLICATED) -> Mesh:
    """Return a mesh, by default of one replica on each device of this process.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    chosen = jax.local_devices() if devices is None else devices
    if config == REPLICATED:  # in the order of the devices
        grid = np.array(chosen).reshape([-1 if axis == "data" else 1 for axis in AXES])
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    mesh = make_mesh(config, chosen)
    if num_replicas(mesh) > 1 and mesh.shape["fsdp"] > 1 and mesh.shape["context"] > 1:
        # Its partitioner aborts at convolutions (jax 0.10.2 to 0.12.0).
        raise UserError(
            f"XLA cannot sample with mesh.data {mesh.shape['data']}, mesh.fsdp "
            f"{mesh.shape['fsdp']} and mesh.context {mesh.shape['context']}: expected one of them "
            "to be 1; set it to 1."
        )
    return mesh


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copy a tree to every device of the mesh."""
    return to_devices(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def shard(params: PyTree, mesh: Mesh, axes: ParamAxes) -> PyTree:
    """Place parameters with these axes: whole on the replicas' devices, or split over them."""
    return to_devices(params, state_shardings(params, mesh, axes))


def to_devices(tree: PyTree, shardings: PyTree) -> PyTree:
    """Move arrays; those of a mesh over hosts stay on the devices, unless one host wants them."""

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        over_hosts = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if sharding.is_fully_addressable:
            return jax.device_put(to_host(leaf) if over_hosts else leaf, sharding)
        return jax.device_put(leaf, sharding) if over_hosts else from_host(leaf, sharding)

    return jax.tree.map(put, tree, shardings)


def per_replica(call: Callable[..., Any], mesh: Mesh) -> Any:
    """Jit `call(weights, *inputs)` to run on each replica with its part of the inputs.

    Inputs and outputs are trees of arrays that are split over the replicas along their first axis.
    Within a replica of several devices XLA partitions the program by the sharding of the weights.
    """
    count = num_replicas(mesh)

    def on_mesh(weights, *inputs):
        if count == 1 < mesh.size:  # XLA partitions all of it
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return call(weights, *inputs)
        specs = (PartitionSpec(), *[BY_REPLICA] * len(inputs))
        # check_vma=False: loops may take a different number of steps on each replica.
        program = jax.shard_map(
            call,
            mesh=mesh,
            in_specs=specs,
            out_specs=BY_REPLICA,
            axis_names=set(AXES if count == mesh.size else REPLICAS),
            check_vma=False,
        )
        return program(weights, *inputs)

    return jax.jit(on_mesh)
