import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh
from jaxdiff.models import attention
from jaxdiff.planning.topology import find_topology


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


def test_blocks_of_queries_exclude_keys_by_the_mask(monkeypatch):
    """Each image its own; without any key, the output is finite."""
    monkeypatch.setattr(attention, "_MIN_CPU_LOGITS", 1)
    q, k, v = random(3, 520, 2, 4), random(3, 9, 2, 4), random(3, 9, 2, 4)
    mask = jnp.arange(9) < jnp.array([9, 4, 0])[:, None]
    out = jax.jit(attention.attend)(q, k, v, mask)
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None])
    np.testing.assert_allclose(out[:2], expected[:2], rtol=1e-4, atol=1e-4)
    assert np.isfinite(out).all()


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


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel of a TPU, interpreted on the CPU."""
    make = functools.partial(splash_attention_kernel.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha_single_device", make)
    return attention._splash


@pytest.mark.parametrize(
    ("n", "m", "masked"),
    [(256, 128, False), (200, 136, False), (256, 256, True), (200, 136, True)],
)
def test_the_kernel_of_a_tpu_is_the_same_attention(n, m, masked, interpreted):
    """Its gradients too, with masks, and with lengths that do not fill its vectors."""
    inputs = random(2, n, 1, 8), random(2, m, 1, 8), random(2, m, 1, 8)
    mask = jnp.arange(m)[None] < jnp.array([m // 3, m])[:, None] if masked else None

    def gradient(attend):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attend(q, k, v, mask)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*inputs)

    ours, expected = gradient(interpreted), gradient(attention._xla)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours, expected
    )


def test_keys_that_a_mask_excludes_do_not_matter_to_the_kernel_of_a_tpu(interpreted):
    q, k = random(1, 128, 1, 8), random(1, 128, 1, 8)
    mask = (jnp.arange(128) % 3 > 0)[None]
    changed = jnp.where(mask[..., None, None], k, 1e3)
    np.testing.assert_array_equal(
        interpreted(q, k, k, mask), interpreted(q, changed, changed, mask)
    )


def test_a_tpu_has_the_largest_blocks_that_divide_its_tokens():
    assert [attention._padded(n) for n in (1024, 1101, 4173)] == [1024, 1152, 4224]
    blocks = {n: [attention._block(n, most) for most in (512, 1024)] for n in (1024, 1152, 1280)}
    assert blocks == {1024: [512, 1024], 1152: [384, 384], 1280: [256, 640]}


@pytest.mark.parametrize(
    ("kind", "size"),
    [("TPU v5 lite", 512), ("TPU v5", 512), ("TPU v6 lite", 1024), ("TPU7x", 1024)],
)
def test_the_largest_block_is_that_of_the_chip_of_the_mesh(kind, size):
    here = make_mesh(MeshConfig(data=2), jax.devices()[:2]).abstract_mesh
    device = dataclasses.replace(here.abstract_device, device_kind=kind)
    mesh = here.update(abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention._largest_block() == size
    assert attention._largest_block() == 512  # of this machine


@pytest.mark.parametrize(
    ("n", "m", "dtype", "expected"),
    [
        (1024, 1024, jnp.bfloat16, True),
        (4096, 4096, jnp.float32, True),
        (1101, 1101, jnp.bfloat16, True),  # 32 x 32 patches and 77 words
        (256, 256, jnp.bfloat16, False),  # few enough to write down
        (16384, 77, jnp.bfloat16, False),  # a third of the keys would pad
        (1024, 1024, jnp.float16, False),
    ],
)
def test_a_tpu_has_its_kernel_where_that_is_faster(n, m, dtype, expected):
    q, k = jnp.zeros((1, n, 1, 8), dtype), jnp.zeros((1, m, 1, 8), dtype)
    assert attention._for_splash(q, k) == expected


def test_a_tpu_has_its_kernel_with_a_mask_too():
    q, mask = jax.ShapeDtypeStruct((1, 1101, 1, 8), jnp.bfloat16), jnp.ones((1, 1101), bool)
    lowered = (
        jax.jit(lambda q: attention.attend(q, q, q, mask))
        .trace(q)
        .lower(lowering_platforms=("tpu",))
    )
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_each_generation_of_tpu_compiles_its_kernel_with_a_mask(topology):
    """Forward and backward, on images that are split over chips: blocks fit the fast memory."""
    pytest.importorskip("libtpu")
    mesh = make_mesh(MeshConfig(data=-1, tensor=2), find_topology(topology).devices)
    shape = (8, 1101, 2, 72)
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=batch_sharding(mesh))
    mask = jax.ShapeDtypeStruct(shape[:2], bool, sharding=batch_sharding(mesh))

    def loss(q, mask):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.sum(attention.attend(q, q, q, mask), dtype=jnp.float32)

    program = jax.jit(jax.grad(loss)).lower(q, mask).compile().as_text()
    assert program is not None
    assert program.count('custom_call_target="tpu_custom_call"') == 3
