"""Products of matrices in the precision that `jax_default_matmul_precision` asks for, on CPUs too.

XLA's CPU backend ignores that setting and multiplies in float32. With "bfloat16" the factors are
rounded to bfloat16 here and summed in float32, as TPUs do by default. CPUs with units for it (AMX)
take a quarter of the time for large ones, and half for a kernel's gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models.cpu_primitives import Bilinear, Operation, bilinear

_ROUNDED = ("bfloat16", "BF16_BF16_F32")


def dot_general(x: Array, kernel: Array, dimensions: Any, *args: Any, **options: Any) -> Array:
    """`jax.lax.dot_general`, with `x @ kernel` of float32 matrices as the setting asks for."""
    matrices = x.ndim == kernel.ndim == 2 and x.dtype == kernel.dtype == jnp.float32
    setting = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if matrices and setting in _ROUNDED:
        return rounded_product(x, kernel)
    return jax.lax.dot_general(x, kernel, dimensions, *args, **options)


# Which axes a product contracts: x @ kernel, z @ kernel.T and x.T @ z.
_OUTPUT, _TO_INPUT, _TO_KERNEL = (((1,), (0,)), ((1,), (1,)), ((0,), (0,)))


def _default(axes: Any) -> Operation:
    return lambda a, b: jax.lax.dot_general(a, b, (axes, ((), ())), precision="bfloat16")


def _rounded(axes: Any) -> Operation:
    def dot(a: Array, b: Array) -> Array:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)

    return dot


def _rounded_to_kernel(x: Array, z: Array) -> Array:
    """Return `x.T @ z`, with the narrower of the two transposed."""
    if x.shape[1] > z.shape[1]:
        return _rounded_to_kernel(z, x).T
    # XLA would multiply a transposed factor in float32; with one more row it is copied first.
    transposed = jnp.pad(x.astype(jnp.bfloat16).T, ((0, 1), (0, 0)))
    return _rounded(_OUTPUT)(transposed, z)[:-1]


product_primitive = bilinear(
    "rounded_product",
    Bilinear(_default(_OUTPUT), _default(_TO_INPUT), _default(_TO_KERNEL)),
    Bilinear(_rounded(_OUTPUT), _rounded(_TO_INPUT), _rounded_to_kernel),
)


def rounded_product(x: Float[Array, "n d"], kernel: Float[Array, "d e"]) -> Float[Array, "n e"]:
    """`x @ kernel`, and its derivatives, of factors rounded to bfloat16, summed in float32.

    CPUs do not round under `jax.vmap`.
    """
    return product_primitive.bind(x, kernel)
