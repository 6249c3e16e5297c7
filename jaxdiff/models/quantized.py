"""Kernels in 8 bits with one scale per output, which layers read as arrays of the compute type.

    kernel ≈ values * scale,   scale = max |kernel| / largest value

The maximum is over all axes but the outputs and the stack of blocks. A layer reads `kernel[...]`,
which multiplies; weights stay in 8 bits in memory. qwix quantises weights alone in matrix products
but not in convolutions (`PtqProvider.conv_general_dilated`, 0.1.8), which are most of a U-Net.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

QuantizedType = Literal["int8", "fp8"]
"""Types of stored kernels: int8, or float8_e4m3fn, with 3 bits of mantissa."""

_TYPES: dict[str, tuple[Any, float]] = {
    "int8": (np.int8, 127.0),
    "fp8": (ml_dtypes.float8_e4m3fn, 448.0),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedKernel:
    """A kernel in 8 bits.

    Attributes:
      values: int8 or float8, of the kernel's shape.
      scale: float32; its axes have length 1 but for the outputs and the stack of blocks.
      compute: name of the type that a layer reads.
    """

    values: Any
    scale: Any
    compute: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return self.values.ndim

    @property
    def dtype(self) -> np.dtype:
        """Type that a layer reads."""
        return jnp.dtype(self.compute)

    def __getitem__(self, index: Any) -> Array:
        """Return a part of the kernel, dequantised; `...` for all of it."""
        kernel = jnp.asarray(self.values).astype(jnp.float32) * jnp.asarray(self.scale)
        return kernel.astype(self.compute)[index]

    def astype(self, dtype: Any) -> Array:
        """Return the kernel, dequantised, in a type."""
        return self[...].astype(dtype)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a tree of parameters is a quantised kernel."""
    return isinstance(leaf, QuantizedKernel)


def quantize_kernel(
    kernel: Float[Any, "*axes outputs"] | QuantizedKernel, axes: int, kind: QuantizedType
) -> QuantizedKernel:
    """Quantise a kernel on the host, to the nearest values; quantised ones are returned unchanged.

    Args:
      kernel: of a layer, or of a stack of layers.
      axes: number of the last axes that are those of one layer.
      kind: of values.
    """
    if isinstance(kernel, QuantizedKernel):
        return kernel
    dtype, largest = _TYPES[kind]
    exact = np.asarray(kernel, np.float32)
    most = np.max(np.abs(exact), axis=tuple(range(-axes, -1)), keepdims=True)
    scale = np.where(most > 0, most / largest, 1).astype(np.float32)
    values = exact / scale
    values = (np.rint(values) if kind == "int8" else values).astype(dtype)
    return QuantizedKernel(values, scale, str(jnp.dtype(kernel.dtype)))
