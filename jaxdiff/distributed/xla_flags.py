"""XLA flags for compiling the training step, by kind of device.

The defaults overlap collectives with computation: while one layer is computed, the weights of the
next are gathered and the gradients of the previous one are summed.
"""

import functools
import logging
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from jaxdiff.config.checked import checked
from jaxdiff.distributed.chips import Device, find_chip
from jaxdiff.errors import UserError

# libtpu 0.0.42.1 (JAX 0.10.2) and 0.0.50.1 (JAX 0.12.0.1) accept these four for every generation
# that they compile for: v2, v3, v4, v5e, v5p, v6e and 7x.
OVERLAP_TPU = (
    # Order instructions so that computation hides the latency of asynchronous ones.
    "xla_tpu_enable_latency_hiding_scheduler=true",
    # Split each all-gather into a start and an end, between which others run.
    "xla_enable_async_all_gather=true",
    # Fuse collectives with the computation that runs at the same time,
    "xla_tpu_enable_async_collective_fusion=true",
    # on the same TensorCore.
    "xla_tpu_overlap_compute_collective_tc=true",
)
# Extend that fusion to all-gathers ("continuation fusion"). Together with asynchronous all-gathers
# libtpu 0.0.50.1 refuses it on all but v5e, for it can give wrong results there. 0.0.42.1 accepts
# it on v4, v5p and v6e too; on v2 and v3 its program does not fit into the flags' memory (sflag).
FUSE_ALL_GATHER = "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
# Kinds of the table of chips whose flags differ from OVERLAP_TPU.
TPU_FLAGS = {
    "TPU v5 lite": (*OVERLAP_TPU, FUSE_ALL_GATHER),
    "TPU v5e": (*OVERLAP_TPU, FUSE_ALL_GATHER),
}
# The same scheduler as on TPUs. JAX 0.10.2 and 0.12.0.1 know the flag; it names no kind of GPU.
OVERLAP_GPU = ("xla_gpu_enable_latency_hiding_scheduler=true",)

_TRUTH = {"true": True, "false": False}
_REFUSED = re.compile(
    r"No such compile option: '(?P<unknown>\w+)'"
    r"|Failed to parse '(?P<text>.*)' into flag (?P<flag>\w+)"  # libtpu
    r"|While setting option (?P<option>\w+), (?P<reason>.*? value)"  # CPUs and GPUs
)


@checked
@dataclass(frozen=True, kw_only=True)
class CompilerConfig:
    """Flags of XLA for the training step, each `name=value`.

    Attributes:
      tpu: flags on TPUs; None selects defaults for the kind of TPU.
      gpu: flags on GPUs; None selects defaults.

    Raises:
      UserError: a flag has another form.
    """

    tpu: tuple[str, ...] | None = None
    gpu: tuple[str, ...] | None = None

    def __post_init__(self):
        for flag in (*(self.tpu or ()), *(self.gpu or ())):
            name, _, value = flag.partition("=")
            if not name.startswith("xla_") or not value:
                raise UserError(
                    f"compiler: {flag!r} is not an XLA flag: expected xla_NAME=VALUE, no dashes."
                )

    def flags(self, device: Device) -> tuple[str, ...]:
        """Return the flags for a device; none on a CPU."""
        if device.platform == "tpu":
            chip = find_chip(device.device_kind)
            default = TPU_FLAGS.get(chip.kind, OVERLAP_TPU) if chip else OVERLAP_TPU
            return default if self.tpu is None else self.tpu
        if device.platform in ("gpu", "cuda"):
            return OVERLAP_GPU if self.gpu is None else self.gpu
        return ()

    def known_flags(self, mesh: Mesh) -> tuple[str, ...]:
        """Return the flags for the devices of a mesh without those that their compiler lacks.

        One warning reports each of these.

        Raises:
          UserError: the compiler does not know a flag's value.
        """
        # Of a mesh over several hosts, only the devices of this host can be compiled for alone.
        mine = (d for d in mesh.devices.flat if d.process_index == jax.process_index())
        device = next(mine, mesh.devices.flat[0])
        return _without_unknown(self.flags(device), device)


def as_options(flags: tuple[str, ...]) -> dict[str, str | bool]:
    """Return flags as `jax.jit` takes its `compiler_options`.

    Truth values become `bool`: GPUs and CPUs refuse the string "true".
    """
    pairs = (flag.partition("=") for flag in flags)
    return {name: _TRUTH.get(value.lower(), value) for name, _, value in pairs}


@functools.cache
def _without_unknown(flags: tuple[str, ...], device: Any) -> tuple[str, ...]:
    """Compile the identity with the flags, and again without each that is not known."""
    if not flags:
        return flags
    identity = jax.jit(
        lambda x: x, out_shardings=SingleDeviceSharding(device), compiler_options=as_options(flags)
    )
    try:
        identity.lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()
    except jax.errors.JaxRuntimeError as error:
        refused = _REFUSED.search(str(error))
        if refused is None:
            raise
        unknown = refused["unknown"]
        if unknown is None:
            reason = refused["reason"] or f"{refused['text']!r} is not a valid value"
            raise UserError(
                f"compiler: {reason} of {refused['flag'] or refused['option']}: expected a value "
                "of the flag's type; correct --compiler.tpu or --compiler.gpu."
            ) from None
    else:
        return flags
    logging.getLogger(__name__).warning(
        "compiler: this version of XLA knows no flag %s: compiling without it.", unknown
    )
    return _without_unknown(tuple(f for f in flags if not f.startswith(f"{unknown}=")), device)
