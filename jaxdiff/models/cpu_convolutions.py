"""Convolutions of small maps with many channels, computed on CPUs as one matrix product (im2col).

The columns of the product are the 3 x 3 windows of the map (Chellapilla et al. 2006, section 3.2).
XLA's CPU backend takes longer for a convolution of a small map, because its work per kernel element
is small. On other platforms the convolution is `jax.lax`'s, and so are its gradients.

<conv(x, k), z> is linear in x, k and z. Its gradients with respect to the three are the primitives
of this module, and each is a transpose of the other two. As primitives they are opaque to
differentiation and to rematerialisation policies, so the CPU's way leaves no residuals in the
programs of other platforms.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

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


def _primitive(name: str, default: Callable[..., Array], cpu: Callable[..., Array]) -> Primitive:
    """Return a primitive that is lowered as `cpu` for CPUs and as `default` for others."""
    primitive = Primitive(name)

    def shape_of(*operands: Any) -> Any:
        out = jax.eval_shape(default, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands))
        return ShapedArray(out.shape, out.dtype)

    primitive.def_impl(lambda *operands: jax.jit(primitive.bind)(*operands))
    primitive.def_abstract_eval(shape_of)
    batching.primitive_batchers[primitive] = lambda operands, axes: (
        jax.vmap(default, axes)(*operands),
        0,
    )
    for function, platform in ((default, None), (cpu, "cpu")):
        rule = mlir.lower_fun(function, multiple_results=False)
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


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


_output = _primitive("small_conv", _conv, _product)
_input = _primitive("small_conv_input", _to_input(_conv), _to_input(_product))
_kernel = _primitive("small_conv_kernel", _to_kernel(_conv), _to_kernel(_product))
# The rules get the cotangent of the result, then the operands; one of these is unknown.
ad.defbilinear(
    _output,
    lambda z, x, kernel: _input.bind(z, kernel),
    lambda z, x, kernel: _kernel.bind(x, z),
)
ad.defbilinear(
    _input,
    lambda x, z, kernel: _output.bind(x, kernel),
    lambda x, z, kernel: _kernel.bind(x, z),
)
ad.defbilinear(
    _kernel,
    lambda kernel, x, z: _input.bind(z, kernel),
    lambda kernel, x, z: _output.bind(x, kernel),
)


def convolve(x: Maps, kernel: Kernel) -> OutputMaps:
    """Convolve maps with a kernel for which `applies` is true; sizes stay."""
    return _output.bind(x, kernel)
