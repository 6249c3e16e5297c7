import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh
from jaxdiff.models import attention


def random(*shape):
    values = np.random.default_rng(len(shape) + shape[1]).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize(("n", "m"), [(520, 6), (521, 6), (512, 512)])
def test_attention_in_blocks_of_queries_is_the_same(n, m, monkeypatch):
    """Gradients too, and where no number of blocks divides the queries."""
    monkeypatch.setattr(attention, "_MIN_CPU_LOGITS", 1)
    inputs = random(2, n, 2, 4), random(2, m, 2, 4), random(2, m, 2, 4)

    def gradient(attend):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attend(q, k, v)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*inputs)

    ours, expected = gradient(attention.attend), gradient(jax.nn.dot_product_attention)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected
    )


def test_only_long_sequences_are_split_into_blocks():
    def loops(n):
        jaxpr = jax.make_jaxpr(attention.attend)(*(random(1, n, 1, 4),) * 3)
        return "scan" in str(jaxpr)

    assert loops(512)
    assert not loops(256)


def test_half_precision_stays_half_precision(monkeypatch):
    monkeypatch.setattr(attention, "_MIN_CPU_LOGITS", 1)
    q = random(1, 8, 1, 4).astype(jnp.bfloat16)
    out = attention.attend(q, q, q)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        out.astype(jnp.float32),
        jax.nn.dot_product_attention(q, q, q).astype(jnp.float32),
        atol=0.03,
    )


@pytest.fixture
def on_mesh():
    """`on_mesh(config, function)`: the function, traced under a mesh of eight devices."""

    def wrap(config, function):
        mesh = make_mesh(config)

        def call(*args):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args)

        return jax.jit(call, in_shardings=batch_sharding(mesh))

    return wrap


@pytest.mark.parametrize(("n", "masked"), [(16, True), (18, False)])  # 18 do not divide by four
def test_tokens_on_several_devices_are_the_same_attention(n, masked, on_mesh):
    inputs = random(4, n, 2, 8), random(4, 6, 2, 8), random(4, 6, 2, 8)
    mask = jnp.arange(6)[None] < jnp.array([2, 6, 3, 1])[:, None] if masked else None

    def gradient(q, k, v):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attention.attend(q, k, v, mask)))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    shared = on_mesh(MeshConfig(data=2, context=4), gradient)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.device_get(shared(*inputs)),
        jax.device_get(jax.jit(gradient)(*inputs)),
    )


def test_each_device_attends_for_its_own_tokens(on_mesh):
    q, k = random(4, 16, 2, 8), random(4, 6, 2, 8)
    out = on_mesh(MeshConfig(data=2, context=2, tensor=2), attention.attend)(q, k, k)
    assert {shard.data.shape for shard in out.addressable_shards} == {(2, 8, 1, 8)}


def test_the_kernel_of_a_tpu_is_the_same_attention(monkeypatch):
    """Interpreted on the CPU, its gradients too."""
    make = functools.partial(attention.splash.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(attention.splash, "make_splash_mha_single_device", make)
    inputs = random(1, 256, 1, 8), random(1, 128, 1, 8), random(1, 128, 1, 8)

    def gradient(attend):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attend(q, k, v)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*inputs)

    ours, expected = gradient(attention._splash), gradient(jax.nn.dot_product_attention)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours, expected
    )


@pytest.mark.parametrize(
    ("n", "m", "dtype", "masked", "expected"),
    [
        (1024, 1024, jnp.bfloat16, False, True),
        (4096, 4096, jnp.float32, False, True),
        (256, 256, jnp.bfloat16, False, False),  # few enough to write down
        (1024, 1024, jnp.bfloat16, True, False),
        (16384, 77, jnp.bfloat16, False, False),  # no multiple of a block
        (1024, 1024, jnp.float16, False, False),
    ],
)
def test_a_tpu_has_its_kernel_where_that_is_faster(n, m, dtype, masked, expected):
    q, k = jnp.zeros((1, n, 1, 8), dtype), jnp.zeros((1, m, 1, 8), dtype)
    mask = jnp.ones((1, m), bool) if masked else None
    assert attention._for_splash(q, k, mask) == expected
