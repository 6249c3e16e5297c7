"""Convolutions of small maps with many channels, computed on CPUs as one matrix product (im2col).

The columns of the product are the 3 x 3 windows of the map (Chellapilla et al. 2006, section 3.2).
XLA's CPU backend takes longer for a convolution of a small map, because its work per kernel element
is small. On other platforms the convolution is `jax.lax`'s, and so are its gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models.cpu_primitives import Bilinear, bilinear

# The product wins where all of this holds (docs/results.md, "Speed against PyTorch").
_MAX_POSITIONS = 16 * 16
_MIN_CHANNELS = 512

_LAYOUT = ("NHWC", "HWIO", "NHWC")

Maps = Float[Array, "b h w c"]
OutputMaps = Float[Array, "b h w d"]
Kernel = Float[Array, "3 3 c d"]


def applies(x: Maps, kernel: Kernel) -> bool:
    """Whether a convolution of stride 1 with zero padding that keeps sizes is faster as a product.

    It depends on shapes and types only, not on the platform.
    """
    return (
        kernel.shape[:2] == (3, 3)
        and x.shape[1] * x.shape[2] <= _MAX_POSITIONS
        and min(kernel.shape[2:]) >= _MIN_CHANNELS
        and x.dtype == kernel.dtype == jnp.float32
    )


def _conv(x: Maps, kernel: Kernel) -> OutputMaps:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)


def _product(x: Maps, kernel: Kernel) -> OutputMaps:
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    columns = jnp.concatenate(windows, axis=-1).reshape(b * h * w, 9 * c)
    return (columns @ kernel.reshape(9 * c, -1)).reshape(b, h, w, -1)


def _to_input(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return the transpose of `function(x, kernel)` with respect to x, called (z, kernel)."""

    def transpose(z: OutputMaps, kernel: Kernel) -> Maps:
        x = jax.ShapeDtypeStruct((*z.shape[:3], kernel.shape[2]), z.dtype)
        return jax.linear_transpose(lambda x: function(x, kernel), x)(z)[0]

    return transpose


def _to_kernel(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return the transpose of `function(x, kernel)` with respect to the kernel, called (x, z)."""

    def transpose(x: Maps, z: OutputMaps) -> Kernel:
        kernel = jax.ShapeDtypeStruct((3, 3, x.shape[3], z.shape[3]), z.dtype)
        return jax.linear_transpose(lambda kernel: function(x, kernel), kernel)(z)[0]

    return transpose


def _with_gradients(function: Callable[..., Array]) -> Bilinear:
    return Bilinear(function, _to_input(function), _to_kernel(function))


_primitive = bilinear("small_conv", _with_gradients(_conv), _with_gradients(_product))


def convolve(x: Maps, kernel: Kernel) -> OutputMaps:
    """Convolve maps with a kernel for which `applies` is true; sizes stay."""
    return _primitive.bind(x, kernel)
