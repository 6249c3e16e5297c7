"""Products in place of convolutions on CPUs: equal results, and unchanged programs elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.models import cpu_convolutions
from jaxdiff.models.convolutions import Conv

CHANNELS = 512


def lax_conv(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, KERNEL = random(0, 2, 3, 5, 6), random(1, 3, 3, 6, 7)


def distance(value, expected):
    return float(jnp.linalg.norm(value - expected) / jnp.linalg.norm(expected))


def test_equals_the_convolution():
    assert distance(cpu_convolutions.convolve(X, KERNEL), lax_conv(X, KERNEL)) < 1e-6


@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_equal_those_of_the_convolution(order):
    def loss(conv):
        def of(x, kernel):
            return jnp.sum(jnp.sin(conv(x, kernel)))

        if order == 1:
            return of
        return lambda *args: sum(jnp.sum(g**2) for g in jax.grad(of, (0, 1))(*args))

    ours, theirs = (
        jax.jit(jax.grad(loss(conv), (0, 1)))(X, KERNEL)
        for conv in (cpu_convolutions.convolve, lax_conv)
    )
    for value, expected in zip(ours, theirs, strict=True):
        assert distance(value, expected) < 1e-5


def test_tangents_and_batches_equal_those_of_the_convolution():
    dx, xs = random(2, *X.shape), random(3, 4, *X.shape)

    def both(conv):
        tangent = jax.jvp(conv, (X, KERNEL), (dx, KERNEL))[1]
        return tangent, jax.vmap(conv, (0, None))(xs, KERNEL)

    for value, expected in zip(both(cpu_convolutions.convolve), both(lax_conv), strict=True):
        assert distance(value, expected) < 1e-6


def test_layers_with_small_maps_and_many_channels_are_products_on_cpus_only():
    def program(size, platform, width=CHANNELS):
        conv = Conv(width, width, 3, 1, nnx.Rngs(0))
        x = jax.ShapeDtypeStruct((1, size, size, width), jnp.float32)

        def loss(x):
            return jnp.sum(conv(x) ** 2)

        return str(jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=(platform,)).as_text())

    assert "stablehlo.convolution" not in program(16, "cpu")
    assert "stablehlo.convolution" in program(32, "cpu")
    assert "stablehlo.convolution" in program(16, "cpu", width=64)
    for platform in ("tpu", "cuda"):
        text = program(16, platform)
        assert text.count("stablehlo.convolution") == 2  # the layer, and its gradient
        assert "dot_general" not in text
