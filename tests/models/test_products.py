"""Products rounded to bfloat16 on request: their values, derivatives and programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.models.layers import Dense, checkpoint
from jaxdiff.models.products import rounded_product


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, WIDE, NARROW = random(0, 12, 5), random(1, 5, 7), random(2, 5, 3)


def rounded(*arrays):
    return [np.asarray(x.astype(jnp.bfloat16), np.float64) for x in arrays]


@pytest.mark.parametrize("kernel", [WIDE, NARROW], ids=["wide", "narrow"])
def test_value_and_gradients_are_products_of_rounded_factors(kernel):
    out, gradients = jax.jit(lambda *args: jax.vjp(rounded_product, *args))(X, kernel)
    z = random(3, *out.shape)
    dx, dkernel = gradients(z)
    x, k, c = rounded(X, kernel, z)
    for found, expected in ((out, x @ k), (dx, c @ k.T), (dkernel, x.T @ c)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sides", [(1, 1, 1), (1, 5, 300), (64, 1, 7), (257, 16, 1)], ids=str)
def test_sides_of_one(sides):
    n, d, e = sides

    @jax.jit
    def run(x, kernel, z):
        out, gradients = jax.vjp(rounded_product, x, kernel)
        return out, gradients(z)

    out, (dx, dkernel) = run(jnp.ones((n, d)), jnp.ones((d, e)), jnp.ones((n, e)))
    for found, expected in ((out, d), (dx, e), (dkernel, n)):
        np.testing.assert_array_equal(found, np.full(found.shape, expected))


def test_tangents_batches_and_second_derivatives():
    x, k = rounded(X, WIDE)
    tangent = jax.jvp(rounded_product, (X, WIDE), (X, WIDE))[1]
    np.testing.assert_allclose(tangent, 2 * x @ k, rtol=1e-5, atol=1e-5)
    batch = jax.vmap(rounded_product, (0, None))(jnp.stack([X, -X]), WIDE)
    np.testing.assert_allclose(batch, [x @ k, -x @ k], rtol=2e-2, atol=5e-2)

    def along(kernel):  # as the mean velocity's loss differentiates a derivative
        return jax.jvp(lambda x: rounded_product(x, kernel), (X,), (X,))[1].sum()

    expected = np.broadcast_to(x.sum(0)[:, None], WIDE.shape)
    np.testing.assert_allclose(jax.grad(along)(WIDE), expected, rtol=1e-5, atol=1e-5)


def test_layers_round_only_when_asked():
    layer = Dense(5, 7, rngs=nnx.Rngs(0))
    exact = np.asarray(X, np.float64) @ np.asarray(layer.kernel[...], np.float64)
    x, k = rounded(X, layer.kernel[...])

    def run():  # a new function, so that each setting is traced
        return jax.jit(lambda x: layer(x))(X)

    np.testing.assert_allclose(run(), exact, rtol=1e-5, atol=1e-5)
    for name in ("bfloat16", "BF16_BF16_F32"):
        with jax.default_matmul_precision(name):
            np.testing.assert_allclose(run(), x @ k, rtol=1e-5, atol=1e-5)
            with jax.default_matmul_precision("highest"):
                np.testing.assert_allclose(run(), exact, rtol=1e-5, atol=1e-5)
    assert np.abs(x @ k - exact).max() > 1e-4


def test_other_platforms_get_the_products_alone():
    def program(platform):
        def loss(x, kernel):
            return jnp.sum(rounded_product(x, kernel) ** 2)

        traced = jax.jit(jax.grad(loss, (0, 1))).trace(X, WIDE)
        return str(traced.lower(lowering_platforms=(platform,)).as_text())

    for platform in ("tpu", "cuda"):
        text = program(platform)
        assert text.count("stablehlo.dot_general") == 3
        assert "stablehlo.pad" not in text
    assert "bf16" in program("cpu")


def test_remat_dots_keeps_them():
    def count(remat):
        function = checkpoint(lambda x: jnp.sin(rounded_product(x, WIDE)), remat)
        text = str(jax.make_jaxpr(jax.grad(lambda x: function(x).sum()))(X))
        return text.count("rounded_product_output")

    assert (count("none"), count("dots"), count("full")) == (1, 1, 2)
