"""Peak FLOP/s, memory and bandwidth of accelerators, from their data sheets.

A chip is a JAX device: one of two cores on TPU v2, v3 and 7x, with half the chip's figures, and the
whole chip otherwise. FLOP/s are for dense bfloat16 products; chips without bfloat16 units (V100,
T4) are left out.

Sources: for TPUs the pages of Google Cloud's documentation on each version
(cloud.google.com/tpu/docs), for v2 and v3 Jouppi et al. 2020 (Communications of the ACM 63(7)), for
v4 Jouppi et al. 2023 (arXiv 2304.01433), for the inference chip v4i Jouppi et al. 2021 (ISCA); for
GPUs NVIDIA's data sheets.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxdiff.errors import UserError

GIB = 2**30


@runtime_checkable
class Device(Protocol):
    """A `jax.Device`, or a device of a topology that is compiled for."""

    @property
    def platform(self) -> str:
        """The platform, such as "cpu"."""
        ...

    @property
    def device_kind(self) -> str:
        """The vendor's name of the device."""
        ...


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Figures of one JAX device.

    Attributes:
      kind: its `device_kind`, or the first words of it.
      flops: peak dense bfloat16 FLOP/s.
      memory: bytes of device memory.
      bandwidth: bytes/s from and to that memory.
      interconnect: bytes/s, in one direction, to the other chips of its slice or machine over all
        links together.
      network: bytes/s, in one direction, to other slices; 25 Gbit/s where no page states it.
      matrix_side: of the square matrix units; products of smaller matrices fill a whole tile.
      source: of the figures.
    """

    kind: str
    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    matrix_side: int
    source: str
    network: float = 25e9 / 8


def _tpu(
    kind: str,
    flops: float,
    memory: float,
    bandwidth: float,
    interconnect: float,
    page: str,
    matrix_side: int = 128,
    network: float = 25.0,
) -> Chip:
    """Return a chip from TFLOP/s, GiB, GB/s and Gbit/s; links together, in one direction."""
    return Chip(
        kind=f"TPU{kind}",
        flops=flops * 1e12,
        memory=memory * GIB,
        bandwidth=bandwidth * 1e9,
        interconnect=interconnect * 1e9,
        matrix_side=matrix_side,
        network=network * 1e9 / 8,
        source=page,
    )


def _gpu(
    kind: str, flops: float, memory: float, bandwidth: float, interconnect: float, sheet: str
) -> Chip:
    """Return a chip likewise; NVLink, or PCIe without it, counts both directions."""
    return Chip(
        kind=f"NVIDIA {kind}",
        flops=flops * 1e12,
        memory=memory * GIB,
        bandwidth=bandwidth * 1e9,
        interconnect=interconnect / 2 * 1e9,
        matrix_side=16,
        source=f"NVIDIA, {sheet}",
    )


CHIPS = (
    _tpu(" v2", 22.5, 8.0, 350.0, 124.0, "Jouppi et al. 2020"),
    _tpu(" v3", 61.5, 16.0, 450.0, 164.0, "Jouppi et al. 2020"),
    _tpu(" v4 lite", 138.0, 8.0, 614.0, 100.0, "Jouppi et al. 2021"),
    _tpu(" v4", 275.0, 32.0, 1200.0, 300.0, "Jouppi et al. 2023"),
    _tpu(" v5 lite", 197.0, 16.0, 819.0, 200.0, "cloud.google.com/tpu/docs/v5e"),
    _tpu(" v5e", 197.0, 16.0, 819.0, 200.0, "cloud.google.com/tpu/docs/v5e"),
    _tpu(" v5", 459.0, 95.0, 2765.0, 600.0, "cloud.google.com/tpu/docs/v5p", 128, 50.0),
    _tpu(" v5p", 459.0, 95.0, 2765.0, 600.0, "cloud.google.com/tpu/docs/v5p", 128, 50.0),
    _tpu(" v6", 918.0, 32.0, 1638.0, 400.0, "cloud.google.com/tpu/docs/v6e", 256, 100.0),
    _tpu(" v6e", 918.0, 32.0, 1638.0, 400.0, "cloud.google.com/tpu/docs/v6e", 256, 100.0),
    _tpu("7x", 1153.5, 96.0, 3690.0, 300.0, "cloud.google.com/tpu/docs/tpu7x", 256),
    _gpu("A100-SXM4-40GB", 312.0, 40.0, 1555.0, 600.0, "A100 data sheet"),
    _gpu("A100-PCIE-40GB", 312.0, 40.0, 1555.0, 64.0, "A100 data sheet"),
    _gpu("A100-SXM4-80GB", 312.0, 80.0, 2039.0, 600.0, "A100 data sheet"),
    _gpu("A100 80GB PCIe", 312.0, 80.0, 1935.0, 64.0, "A100 data sheet"),
    _gpu("L40", 181.0, 48.0, 864.0, 64.0, "L40 data sheet"),
    _gpu("L40S", 362.0, 48.0, 864.0, 64.0, "L40S data sheet"),
    _gpu("L4", 121.0, 24.0, 300.0, 64.0, "L4 data sheet"),
    _gpu("H100 PCIe", 756.0, 80.0, 2000.0, 128.0, "H100 data sheet, October 2022"),
    _gpu("H100 NVL", 835.0, 94.0, 3900.0, 600.0, "H100 data sheet"),
    _gpu("H100", 989.0, 80.0, 3350.0, 900.0, "H100 data sheet"),
    _gpu("H200", 989.0, 141.0, 4800.0, 900.0, "H200 data sheet"),
    _gpu("H200 NVL", 835.0, 141.0, 4800.0, 900.0, "H200 data sheet"),
    _gpu("B200", 2250.0, 180.0, 8000.0, 1800.0, "DGX B200 data sheet"),
    _gpu("GB200", 2500.0, 186.0, 8000.0, 1800.0, "GB200 NVL72 data sheet"),
)


def find_chip(kind: str) -> Chip | None:
    """Return the chip with this `device_kind`; None if it is not in the table.

    `Chip.kind` matches in whole words, as an L40 is no L4, and the longest match counts.
    """
    found = (chip for chip in CHIPS if f"{kind} ".startswith(f"{chip.kind} "))
    return max(found, key=lambda chip: len(chip.kind), default=None)


def chip_of(device: Device) -> Chip:
    """Return the data sheet of a device.

    Raises:
      UserError: it is not in the table.
    """
    chip = find_chip(device.device_kind)
    if chip is None:
        known = ", ".join(dict.fromkeys(chip.kind for chip in CHIPS))
        raise UserError(
            f"There is no data sheet of a {device.device_kind!r}: expected one of {known}; add its "
            "figures to jaxdiff/distributed/chips.py."
        )
    return chip


def peak_flops(device: Device) -> float | None:
    """Return the peak FLOP/s of one device, the denominator of model FLOP utilisation.

    For an accelerator this is the data sheet's dense bfloat16 figure, or None if it is not in the
    table. A CPU is measured at the first call in a process, which takes about a second: the best of
    three float32 products of 2048 x 2048 matrices, divided by its number of devices. Other load on
    the machine at that time lowers it.
    """
    if device.platform == "cpu":
        return _measured_cpu_flops() / jax.local_device_count("cpu")
    chip = find_chip(device.device_kind)
    return chip.flops if chip else None


def cpu_chip() -> Chip:
    """Return figures of one of this machine's simulated devices, which share it equally.

    FLOP/s are those of `peak_flops`; bandwidth is the best of three sums of arrays of 64 MiB.
    Collectives between simulated devices are copies in memory.
    """
    count = jax.local_device_count("cpu")
    bandwidth = _measured_cpu_bandwidth() / count
    return Chip(
        kind="cpu",
        flops=_measured_cpu_flops() / count,
        memory=float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / count,
        bandwidth=bandwidth,
        interconnect=bandwidth,
        matrix_side=1,
        source="measured on this machine",
    )


@functools.cache
def _measured_cpu_flops() -> float:
    size = 2048
    product = jax.jit(jnp.dot)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x = jnp.ones((size, size), jnp.float32)
        return 2 * size**3 / _best_seconds(lambda: product(x, x))


@functools.cache
def _measured_cpu_bandwidth() -> float:
    size = 2**24
    add = jax.jit(jnp.add, donate_argnums=0)  # in place: new pages would count too
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x = [jnp.ones(size, jnp.float32)]
        y = jnp.ones(size, jnp.float32)

        def in_place() -> jax.Array:
            x[0] = add(x[0], y)
            return x[0]

        return 3 * y.nbytes / _best_seconds(in_place)


def _best_seconds(call: Callable[[], jax.Array]) -> float:
    """Return the least time of three calls; one before these compiles."""
    call().block_until_ready()

    def seconds() -> float:
        start = time.perf_counter()
        call().block_until_ready()
        return time.perf_counter() - start

    return min(seconds() for _ in range(3))
