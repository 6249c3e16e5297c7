import dataclasses
import functools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh
from jaxdiff.models import attention
from jaxdiff.planning.collectives import exchanges
from jaxdiff.planning.hlo import read_program
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


@pytest.mark.parametrize(
    ("n", "m", "heads", "masked", "config"),
    [
        # Keys and values are gathered: few keys, or heads that do not divide.
        (16, 6, 2, True, MeshConfig(data=2, context=4)),
        (18, 6, 4, False, MeshConfig(data=2, context=4)),  # 18 do not divide by four
        (16, 16, 2, True, MeshConfig(data=2, context=4)),
        # Tokens are exchanged for heads.
        (16, 16, 4, True, MeshConfig(data=2, context=4)),
        (18, 18, 4, True, MeshConfig(data=2, context=4)),
        (16, 16, 4, False, MeshConfig(data=2, context=2, tensor=2)),
        (16, 16, 8, True, MeshConfig(data=1, context=4, tensor=2)),
    ],
)
def test_tokens_on_several_devices_are_the_same_attention(n, m, heads, masked, config, on_mesh):
    inputs = random(4, n, heads, 8), random(4, m, heads, 8), random(4, m, heads, 8)
    mask = jnp.arange(m)[None] < jnp.array([2, 6, 3, 1])[:, None] if masked else None

    def gradient(q, k, v):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attention.attend(q, k, v, mask)))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    shared = on_mesh(config, gradient)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.device_get(shared(*inputs)),
        jax.device_get(jax.jit(gradient)(*inputs)),
    )


@pytest.mark.parametrize(
    ("m", "heads", "kind"), [(16, 4, "all-to-all"), (16, 2, "all-gather"), (6, 4, None)]
)
def test_devices_exchange_tokens_for_heads_where_that_sends_less(m, heads, kind):
    """A quarter of queries, keys, values and results in place of all keys and values."""
    mesh = make_mesh(MeshConfig(data=2, context=4))
    split = NamedSharding(mesh, PartitionSpec("data", "context"))
    whole = split if m == 16 else NamedSharding(mesh, PartitionSpec("data"))

    def on_mesh(q, k, v):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attention.attend(q, k, v)

    shapes = [jax.ShapeDtypeStruct((4, n, heads, 8), jnp.float32) for n in (16, m, m)]
    step = jax.jit(on_mesh, in_shardings=(split, whole, whole))
    program = step.lower(*shapes).compile().as_text()
    assert program is not None
    found = exchanges(read_program(program))
    assert {exchange.kind for exchange in found} == ({kind} if kind else set())
    array = 2 * 16 * heads * 8 * 4  # of the images of a device
    sent = {"all-to-all": 4 * array / 4 * 3 / 4, "all-gather": 2 * array * 3 / 4, None: 0}
    assert sum(exchange.sent for exchange in found) == sent[kind]


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
    assert [attention._round_up(n, 128) for n in (1024, 1101, 4173)] == [1024, 1152, 4224]
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


@pytest.mark.parametrize(
    ("n", "m", "masked"), [(64, 128, False), (70, 77, False), (64, 64, True), (100, 77, True)]
)
def test_what_cudnn_gets_is_the_same_attention(n, m, masked, monkeypatch):
    """With keys that a mask excludes anywhere, and gradients; XLA stands in for the kernel."""
    kernel = jax.nn.dot_product_attention

    def checked(*args, implementation=None, **options):
        if implementation == "cudnn":
            assert args[0].shape[1] % 64 == args[1].shape[1] % 64 == 0
            assert args[1].shape[1] == m or "key_value_seq_lengths" in options
        return kernel(*args, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", checked)
    inputs = random(2, n, 2, 8), random(2, m, 2, 8), random(2, m, 2, 8)
    mask = jnp.stack([jnp.arange(m) % 3 > 0, jnp.arange(m) < m // 2]) if masked else None

    def gradient(attend):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attend(q, k, v, mask)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*inputs)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient(attention._cudnn),
        gradient(attention._xla),
    )


def test_cudnn_ignores_keys_where_a_mask_excludes_all(monkeypatch):
    """But for one, so that an image without any does not become NaN."""
    lengths = []

    def kernel(q, k, v, *, key_value_seq_lengths, implementation):
        lengths.extend(key_value_seq_lengths.tolist())
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q = random(2, 64, 1, 8)
    attention._cudnn(q, q, q, jnp.stack([jnp.zeros(64, bool), jnp.arange(64) < 9]))
    assert lengths == [1, 9]


@pytest.fixture
def as_on_nvidia(monkeypatch):
    """A process that traces as one with an NVIDIA GPU does."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)


@pytest.mark.parametrize(
    ("n", "m", "d", "dtype", "expected"),
    [
        (1024, 1024, 72, jnp.bfloat16, True),
        (1101, 77, 128, jnp.float16, True),
        (1024, 1024, 160, jnp.bfloat16, False),
        (1024, 1024, 60, jnp.bfloat16, False),
        (1024, 1024, 64, jnp.float32, False),
        (16, 1024, 64, jnp.bfloat16, False),
    ],
)
@pytest.mark.usefixtures("as_on_nvidia")
def test_nvidia_has_its_kernel_where_that_exists(n, m, d, dtype, expected):
    q, k = jnp.zeros((1, n, 1, d), dtype), jnp.zeros((1, m, 1, d), dtype)
    assert attention._for_cudnn(q, k) == expected


@pytest.mark.parametrize("config", [None, MeshConfig(data=4, tensor=2)])
@pytest.mark.usefixtures("as_on_nvidia")
def test_programs_for_nvidia_call_its_kernel_with_a_mask(config):
    """Forward and backward, on one device and under a mesh."""
    q = jax.ShapeDtypeStruct((8, 1101, 2, 72), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((8, 1101), bool)
    mesh = config and make_mesh(config)

    def loss(q, mask):
        under = jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else nullcontext()
        with under:
            return jnp.sum(attention.attend(q, q, q, mask), dtype=jnp.float32)

    gradient = jax.grad(loss)
    step = jax.jit(gradient, in_shardings=batch_sharding(mesh)) if mesh else jax.jit(gradient)
    traced = step.trace(q, mask)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in program
    assert "__cudnn$fmhaSoftmaxBackward" in program
    assert program.count("PADDING") == 2
