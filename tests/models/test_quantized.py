"""Kernels in 8 bits: rounding, layers that read them, and whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.models.convolutions import Conv
from jaxdiff.models.layers import Dense, cast
from jaxdiff.models.quantized import QuantizedKernel, quantize_kernel

RELATIVE = {"int8": 0.5 / 127, "fp8": 2.0**-4}  # of the largest value; of each value


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kind", RELATIVE)
def test_values_are_the_nearest(kind):
    kernel = normal(2, 16, 8) * np.logspace(-3, 3, 8, dtype=np.float32)
    kernel[1, :, 3] = 0
    found = quantize_kernel(kernel, 2, kind)
    assert found.values.dtype.itemsize == 1
    assert found.scale.shape == (2, 1, 8)
    largest = np.abs(kernel).max(axis=1, keepdims=True)
    bound = largest if kind == "int8" else np.abs(kernel) + 2.0**-9 * largest
    assert (np.abs(np.asarray(found[...]) - kernel) <= RELATIVE[kind] * bound * 1.001).all()
    assert quantize_kernel(found, 2, kind) is found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_reads_the_rounded_kernel_in_the_compute_type(dtype):
    for layer, x, axes in (
        (Dense(6, 4, rngs=nnx.Rngs(0)), normal(3, 6), 2),
        (Conv(6, 4, 3, 1, nnx.Rngs(0)), normal(2, 5, 5, 6), 4),
    ):
        graphdef, params = nnx.split(layer)
        params = nnx.to_pure_dict(params)
        kernel = cast(quantize_kernel(params["kernel"], axes, "int8"), dtype)
        call = jax.jit(lambda p, x, g=graphdef: nnx.merge(g, p)(x))
        bias = params["bias"].astype(dtype)
        found = call({"kernel": kernel, "bias": bias}, jnp.asarray(x, dtype))
        expected = call({"kernel": kernel[...], "bias": bias}, jnp.asarray(x, dtype))
        assert kernel.dtype == found.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(found, expected)


def test_a_models_kernels_take_8_bits(tiny_spec, tiny_bundle):
    found = tiny_spec.quantize(tiny_bundle.params, "int8")
    query = found["denoiser"]["blocks"]["attention"]["q"]
    assert isinstance(query["kernel"], QuantizedKernel)
    assert query["kernel"].shape == (2, 32, 32)
    embedding = found["text_encoders"]["text"]["token_embedding"]
    assert embedding is tiny_bundle.params["text_encoders"]["text"]["token_embedding"]
    kinds = {x.dtype for x in jax.tree.leaves(found["denoiser"])}
    assert kinds == {np.dtype("int8"), np.dtype("float32")}
