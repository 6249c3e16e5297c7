"""Find the devices that a run is planned for, attached to this machine or not.

v5e:16x16   a TPU slice, compiled for by libtpu without a TPU; v5p:4x4x4 is also called v5p-128
2xv5e:16x16 two of them, connected by the data center's network
cpu:8       simulated devices of this machine
local       the devices of this machine
h100:8      GPUs, attached or not
"""

import contextlib
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxdiff.distributed.chips import Chip, chip_of, cpu_chip, find_chip
from jaxdiff.distributed.mesh import parse_slices
from jaxdiff.errors import UserError
from jaxdiff.planning.collectives import Links

# Kinds of TPU slices, and the number of sides of their shapes.
_SLICES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
# A side of this many chips wraps around; in three dimensions all sides that are multiples of it do
# if all are (cloud.google.com/tpu/docs on each version).
_WRAPS = {2: 16, 3: 4}
_GPUS = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}
# XLA compiles for GPUs only on a machine with one. A v5p slice, the nearest in memory of those that
# compile without a chip, is the proxy.
_PROXY = {1: "1x1x1", 2: "1x1x2", 4: "1x2x2", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to compile for, and their data sheet.

    Attributes:
      name: as in `--topology`.
      devices: of the mesh.
      chip: the data sheet of each device; of a CPU, measured.
      proxy_topology: name of the topology that is compiled for in place of this one.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip
    proxy_topology: str | None = None

    def links(self, mesh: Mesh) -> Links:
        """Return the links between the devices of a mesh: those of a torus for TPU slices."""
        sides = _SLICES.get(parse_slices(self.name)[1].partition(":")[0])
        if sides is None:
            return Links(self.chip.interconnect, self.chip.network)
        devices = list(mesh.devices.flat)
        places = tuple(tuple(device.coords[:sides]) for device in devices)
        shape = [1 + max(place[d] for place in places) for d in range(sides)]
        whole = [side % _WRAPS[sides] == 0 for side in shape]
        wraps = tuple(one and (sides == 2 or all(whole)) for one in whole)
        slices = tuple(getattr(device, "slice_index", 0) for device in devices)
        return Links(self.chip.interconnect, self.chip.network, places, wraps, slices)


def find_topology(name: str) -> Topology:
    """Find a topology by name.

    Raises:
      UserError: the name, chip or shape is unknown; there are too few devices, or no libtpu.
    """
    if name in ("local", "gpu"):
        return _local(name)
    count, single = parse_slices(name)
    kind, _, shape = single.partition(":")
    if kind in _SLICES:
        if not re.fullmatch(r"\d+(x\d+)*", shape) or shape.count("x") + 1 != _SLICES[kind]:
            sides = "x".join(["4"] * _SLICES[kind])
            raise UserError(
                f"The topology {name!r} has no shape that a slice of {kind} can have: expected "
                f"{_SLICES[kind]} sides, such as {kind}:{sides}."
            )
        devices = _slices(single, count)
        return Topology(name=name, devices=devices, chip=chip_of(devices[0]))
    if kind == "cpu" and re.fullmatch("[1-9][0-9]{0,4}", shape):
        return Topology(name=name, devices=_simulated(count * int(shape)), chip=cpu_chip())
    if kind in _GPUS and count == 1 and re.fullmatch("[1-9][0-9]?", shape) and int(shape) in _PROXY:
        proxy, chip = f"v5p:{_PROXY[int(shape)]}", find_chip(_GPUS[kind])
        assert chip is not None
        return Topology(name=name, devices=_slices(proxy), chip=chip, proxy_topology=proxy)
    raise UserError(
        f"There is no topology {name!r}: expected a slice of {', '.join(_SLICES)} such as "
        "v5e:16x16, several such as 2xv5e:16x16, GPUs such as h100:8 "
        f"({', '.join(_GPUS)}; a power of two up to 64 of them), "
        "cpu:N for simulated devices, or local for those of this machine."
    )


def _slices(name: str, count: int = 1) -> tuple[Any, ...]:
    """Return devices to compile for, without any that runs programs."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"Compiling for {name} needs the package libtpu, which is not installed: run "
            "pip install -e '.[tpu]' in a clone of jaxdiff."
        )
    # No TPU is used: libtpu need neither query the metadata server nor lock the device.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        # Both cores of a v4 chip are one device, as on a chip that runs; on later ones by default.
        cores = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=count, **cores
        )
    except jax.errors.JaxRuntimeError as error:
        reason = re.sub(r"\s+", " ", str(error)).rstrip(".")
        raise UserError(
            f"There is no slice {name} ({reason}): expected sides that are powers of two, such as "
            "v5e:16x16 or v5p:4x4x4."
        ) from None
    return tuple(found.devices)


def _simulated(count: int) -> tuple[Any, ...]:
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # the backend is initialised already
            jax.config.update("jax_num_cpu_devices", count)
    there = jax.devices("cpu")
    if len(there) < count:
        raise UserError(
            f"cpu:{count} asks for more simulated devices than the {len(there)} of this process: "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count} before it starts."
        )
    return tuple(there[:count])


def _local(name: str) -> Topology:
    devices = tuple(jax.devices())
    if name == "gpu" and devices[0].platform != "gpu":
        raise UserError(
            f"This machine has no GPU that JAX can use, only {devices[0].device_kind}: name what "
            "to plan for, such as h100:8 or v5e:16x16, or run pip "
            "install -e '.[gpu]' in a clone of jaxdiff."
        )
    chip = cpu_chip() if devices[0].platform == "cpu" else chip_of(devices[0])
    return Topology(name=name, devices=devices, chip=chip)
