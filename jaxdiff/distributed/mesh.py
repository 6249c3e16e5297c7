"""The mesh of devices: data parallel, fully sharded, tensor and sequence parallel axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
BATCH = PartitionSpec(("data", "fsdp"))
"""A batch is split over these axes; `tensor` and `context` devices see the same images."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each axis has; one of them may be -1: all that remain.

    Attributes:
      data: copies of the model, each on its share of the batch.
      fsdp: devices that share the batch and the parameters, which are gathered layer by layer
        (Zhao et al. 2023).
      tensor: devices that share the heads of attention and the hidden units of MLPs (Shoeybi et al.
        2019); convolutions are not shared.
      context: devices that share each image of a denoiser, some rows each. In attention a device
        computes its queries, for which keys and values are gathered; the convolutions of a U-Net
        exchange the rows at the borders.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Hardware that a recipe has been planned for, and what it then sets.

    Attributes:
      topology: as `jaxdiff plan --topology` takes it.
      mesh: of its devices.
      accumulate: micro-batches of a step, where a whole batch does not fit.
    """

    topology: str
    mesh: MeshConfig
    accumulate: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices`, all of them by default.

    Raises:
      UserError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor, config.context]
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(
            f"mesh {asked}: each axis takes a positive number of devices, and at most one of them "
            "-1 for all that remain."
        )
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes or math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh {asked} does not fit the {len(devices)} devices here: the sizes must multiply "
            "to their number; change mesh.data, mesh.fsdp, mesh.tensor or mesh.context."
        )
    if devices[0].platform == "tpu":  # neighbours on an axis are neighbours on the slice's torus
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif list(devices) == jax.devices():
        grid = mesh_utils.create_device_mesh(sizes, devices)
    else:
        grid = np.array(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def check_batch(batch_size: int, mesh: Mesh, accumulate: int) -> None:
    """Raises `UserError` unless all devices get as many images of each micro-batch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if batch_size % parts:
        raise UserError(
            f"train.batch_size {batch_size} does not divide into {parts} equal parts "
            f"({mesh.shape['data']} data x {mesh.shape['fsdp']} fsdp devices x {accumulate} "
            f"micro-batches); choose a multiple of {parts}."
        )
