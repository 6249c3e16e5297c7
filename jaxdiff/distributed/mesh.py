"""The device mesh: axes for slices, data, fully sharded data, tensor and context parallelism."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Range
from jaxdiff.errors import UserError

REPLICAS = ("slices", "data")
"""Axes along which parameters are replicated."""
AXES = (*REPLICAS, "fsdp", "tensor", "context")
BATCH = PartitionSpec((*REPLICAS, "fsdp"))
"""Axes that split a batch; devices along `tensor` and `context` hold the same images."""


@checked
@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each axis; one of them may be -1: all remaining devices.

    Attributes:
      data: data parallelism: replicas of the model, each with a share of the batch.
      fsdp: fully sharded data parallelism: devices split the batch and the parameters, which are
        gathered layer by layer (Zhao et al. 2023).
      tensor: tensor parallelism: devices split the heads of attention and the hidden units of MLPs
        (Shoeybi et al. 2019); convolutions are not split.
      context: context parallelism: devices split each image of a denoiser by rows. For
        self-attention they exchange tokens for heads (Jacobs et al. 2023), or gather keys and
        values if context x tensor does not divide the heads; convolutions exchange the rows at the
        borders.
      slices: TPU slices, which the data center's network connects. Each has replicas of the model
        and its share of the batch; gradients are reduced within a slice first.
    """

    data: Annotated[int, Range(-1)] = -1
    fsdp: Annotated[int, Range(-1)] = 1
    tensor: Annotated[int, Range(-1)] = 1
    context: Annotated[int, Range(-1)] = 1
    slices: Count = 1


REPLICATED = MeshConfig()
"""A replica on each device."""


def parse_slices(topology: str) -> tuple[int, str]:
    """Parse `2xv5e:16x16`: the number of slices, and the topology of one of them."""
    several = re.fullmatch(r"([1-9][0-9]{0,4})x([a-z]\w*:.*)", topology)
    return (int(several[1]), several[2]) if several else (1, topology)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Build a mesh with Auto axes over `devices`, all devices by default.

    Raises:
      UserError: the sizes of the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and config.slices != found:
        raise UserError(
            f"mesh.slices {config.slices} does not equal the number of TPU slices of these "
            f"devices: expected {found}; set mesh.slices to {found}."
        )
    sizes = [getattr(config, axis) for axis in AXES]
    requested = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(
            f"mesh {requested}: expected a positive number of devices for each axis and -1 (all "
            "that remain) for at most one of them; change mesh.data, mesh.fsdp, mesh.tensor or "
            "mesh.context."
        )
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes or math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh {requested} does not fit the {len(devices)} device{'s' * (len(devices) != 1)}: "
            "expected sizes that multiply to that number; change mesh.data, mesh.fsdp, "
            "mesh.tensor or mesh.context."
        )
    if devices[0].platform == "tpu":  # place neighbours on an axis next to each other on the torus
        grid = _on_torus(sizes, devices)
    elif list(devices) == jax.devices():
        grid = mesh_utils.create_device_mesh(sizes, devices)
    else:
        grid = np.array(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _on_torus(sizes: list[int], devices: Sequence[Any]) -> np.ndarray:
    slices, *within = sizes
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        [1, *within], [slices, *(1 for _ in within)], devices, allow_split_physical_axes=True
    )


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """Return a mesh without devices; all sizes must be given."""
    sizes = tuple(getattr(config, axis) for axis in AXES)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_replicas(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of replicas of a model on a mesh."""
    return math.prod(mesh.shape[axis] for axis in REPLICAS)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def check_batch(batch_size: int, mesh: Mesh, accumulate: int) -> None:
    """Check that every device gets the same number of images of each micro-batch.

    Raises:
      UserError: the batch size is not divisible.
    """
    replicas = num_replicas(mesh)
    parts = replicas * mesh.shape["fsdp"] * accumulate
    if batch_size % parts:
        raise UserError(
            f"train.batch_size {batch_size} is not divisible by {parts} "
            f"({replicas} data x {mesh.shape['fsdp']} fsdp devices x {accumulate} "
            f"micro-batches): expected a multiple of it; choose a multiple of {parts}."
        )
