"""Bilinear operations that CPUs compute in their own way, without a change for other platforms.

<f(x, k), z> is linear in x, k and z. The gradients of f with respect to x and k are operations of
the same kind, and each of the three is a transpose of the other two. As primitives they are opaque
to differentiation and to rematerialisation policies, so the CPU's way leaves no residuals in the
programs of other platforms.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Operation = Callable[..., Array]


class Bilinear(NamedTuple):
    """f(x, k), and its gradients: `to_input(z, k)` and `to_kernel(x, z)` for a cotangent z."""

    output: Operation
    to_input: Operation
    to_kernel: Operation


def bilinear(name: str, default: Bilinear, cpu: Bilinear) -> Primitive:
    """Return a primitive that is lowered as `cpu` for CPUs and as `default` for others.

    Under `jax.vmap` it is `default` on all platforms.
    """
    output, to_input, to_kernel = (
        _primitive(f"{name}_{part}", *ways)
        for part, *ways in zip(Bilinear._fields, default, cpu, strict=True)
    )
    # The rules get the cotangent of the result, then the operands; one of these is unknown.
    ad.defbilinear(
        output,
        lambda z, x, kernel: to_input.bind(z, kernel),
        lambda z, x, kernel: to_kernel.bind(x, z),
    )
    ad.defbilinear(
        to_input,
        lambda x, z, kernel: output.bind(x, kernel),
        lambda x, z, kernel: to_kernel.bind(x, z),
    )
    ad.defbilinear(
        to_kernel,
        lambda kernel, x, z: to_input.bind(z, kernel),
        lambda kernel, x, z: output.bind(x, kernel),
    )
    return output


def _primitive(name: str, default: Operation, cpu: Operation) -> Primitive:
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
