import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models import attention


def draw(*shape):
    values = np.random.default_rng(len(shape) + shape[1]).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize(("n", "m"), [(520, 6), (521, 6), (512, 512)])
def test_piece_by_piece_is_the_same_attention(n, m, monkeypatch):
    """Gradients too, and where no number of pieces divides the queries."""
    monkeypatch.setattr(attention, "_MANY", 1)
    inputs = draw(2, n, 2, 4), draw(2, m, 2, 4), draw(2, m, 2, 4)

    def gradient(attend):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attend(q, k, v)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*inputs)

    ours, expected = gradient(attention.attend), gradient(jax.nn.dot_product_attention)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected
    )


def test_only_many_products_are_taken_piece_by_piece():
    def loops(n):
        jaxpr = jax.make_jaxpr(attention.attend)(*(draw(1, n, 1, 4),) * 3)
        return "scan" in str(jaxpr)

    assert loops(512)
    assert not loops(256)


def test_half_precision_stays_half_precision(monkeypatch):
    monkeypatch.setattr(attention, "_MANY", 1)
    q = draw(1, 8, 1, 4).astype(jnp.bfloat16)
    out = attention.attend(q, q, q)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        out.astype(jnp.float32),
        jax.nn.dot_product_attention(q, q, q).astype(jnp.float32),
        atol=0.03,
    )
