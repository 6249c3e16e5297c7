"""Multi-head attention with the fastest kernel of each kind of device.

  NVIDIA  cuDNN's flash attention, with or without a mask, in bfloat16 or float16 with heads of at
          most 128 channels
  TPU     splash attention, for long sequences, with or without a mask
  CPU     blocks of queries, for long sequences
  else    XLA, which materializes the logits

A kernel works on one device. Under the mesh of the traced program, attention is sharded over images
and heads. Where `context` splits tokens, devices exchange them for heads in self-attention, if the
heads divide among them, which sends less than gathering keys and values (`_exchanges_heads`).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxdiff.distributed.sharding import Axes, batch_axes, traced_mesh
from jaxdiff.models.layers import EMBED, FROM_HEADS, TO_HEADS, Dense, apply_rope

with epy.lazy_imports():  # with Pallas; only where a program may run on a TPU
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as splash_mask,
    )


def linear(
    inputs: int,
    outputs: int,
    rngs: nnx.Rngs,
    *,
    axes: Axes = EMBED,
    zero: bool = False,
    bias: bool = True,
) -> Dense:
    """Build a linear layer with Xavier or zero initialisation."""
    init = nnx.initializers.zeros if zero else nnx.initializers.xavier_uniform()
    return Dense(inputs, outputs, axes=axes, kernel_init=init, use_bias=bias, rngs=rngs)


# A CPU splits attention with at least this many logits into blocks of queries: on two cores 4096
# positions of 8 heads (Stable Diffusion at 512 pixels) take 0.7 s instead of 4.5.
_MIN_CPU_LOGITS, _CPU_BLOCK = 2**18, 256
_EXCLUDED = float(np.finfo(np.float32).min) / 2  # logit of a key that the mask excludes
# A TPU uses splash attention from this many logits on; below it XLA is faster.
_MIN_SPLASH_LOGITS = 2**20
_CUDNN_TILE = 64  # queries or keys
_LANES = 128  # of a TPU's vector unit; block lengths are multiples of it
_MAX_SPLASH_PADDING = 1.25  # times as many logits as without padding to those multiples
# The largest block of splash attention, in queries and in keys: MaxText's default, 512, and for v6e
# and later 1024, in parts of 512 keys, as in MaxDiffusion's config of Z-Image for v6e.
_SPLASH_BLOCK, _SPLASH_BLOCKS = 512, (("TPU v6", 1024), ("TPU7", 1024))


@jax.named_scope("attention")
def attend(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v for each head, over the keys where the mask is true."""
    mesh = traced_mesh()
    has_kernel = _for_splash(q, k) or _for_cudnn(q, k)
    if mesh is None or (mesh.shape["context"] == 1 and not has_kernel):
        return _attend(q, k, v, mask)
    axes = batch_axes(mesh)
    images = axes if q.shape[0] % math.prod(mesh.shape[a] for a in axes) == 0 else None
    heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None
    tokens = "context" if q.shape[1] % mesh.shape["context"] == 0 else None
    by_token = PartitionSpec(images, tokens, heads)
    queries, keys = by_token, PartitionSpec(images, None, heads)
    inputs: list[Any] = [q, k, v]
    if _exchanges_heads(q, k, mesh):
        queries = keys = PartitionSpec(images, None, ("tensor", "context"))
        inputs = [jax.lax.with_sharding_constraint(x, by_token) for x in inputs]
    shared: list[Any] = [queries, keys, keys]
    if mask is not None:
        shared, inputs = [*shared, PartitionSpec(images)], [*inputs, mask]
    local = jax.shard_map(
        _attend,
        mesh=mesh,
        in_specs=tuple(shared),
        out_specs=queries,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )
    return jax.lax.with_sharding_constraint(local(*inputs), by_token)


def _exchanges_heads(q: Array, k: Array, mesh: AbstractMesh) -> bool:
    """Whether devices along `context` hold all tokens of some heads (Jacobs et al. 2023, Ulysses).

    In self-attention, whose keys are split like its queries: of c devices each then sends (c - 1)/c
    of a c-th of queries, keys, values and results, in place of (c - 1)/c of all keys and values.
    """
    context = mesh.shape["context"]
    is_self = q.shape[1] == k.shape[1]
    return context > 1 and is_self and q.shape[2] % (context * mesh.shape["tensor"]) == 0


def _attend(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Attend on one device, with its fastest kernel."""
    kernels: dict[str, Callable[..., Array]] = {}
    if q.shape[1] * k.shape[1] >= _MIN_CPU_LOGITS:
        kernels["cpu"] = _in_blocks
    if _for_splash(q, k):
        kernels["tpu"] = _splash
    if _for_cudnn(q, k):
        kernels["cuda"] = _cudnn
    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    if not kernels:
        return _xla(*inputs)
    return jax.lax.platform_dependent(*inputs, default=_xla, **kernels)


def _xla(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """XLA's attention, with all logits in memory."""
    mask = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _for_splash(q: Array, k: Array) -> bool:
    lengths = q.shape[1], k.shape[1]
    logits, padded = math.prod(lengths), math.prod(_round_up(n, _LANES) for n in lengths)
    return (
        logits >= _MIN_SPLASH_LOGITS
        and padded <= _MAX_SPLASH_PADDING * logits
        and q.dtype in (jnp.bfloat16, jnp.float32)
    )


def _for_cudnn(q: Array, k: Array) -> bool:
    """Whether cuDNN applies; only a process with a GPU can trace it."""
    return (
        jax.default_backend() == "gpu"
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[3] <= 128
        and q.shape[3] % 8 == 0
        and q.shape[1] >= _CUDNN_TILE
    )


def _cudnn(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """NVIDIA's flash attention (Dao et al. 2022), on tokens padded to whole tiles.

    It reads a number of keys for each image, so that the keys where the mask is true are moved to
    the front: their order does not matter. A mask of logits would be written for all queries, and
    so would its gradient.
    """
    n, m = q.shape[1], k.shape[1]
    used = None if m % _CUDNN_TILE == 0 else jnp.full(k.shape[0], m, jnp.int32)
    if mask is not None:
        order = jnp.argsort(~mask, axis=1, stable=True)
        k, v = (jax.vmap(_permuted)(x, order) for x in (k, v))
        used = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)
    q, k, v = (_pad_tokens(x, _round_up(x.shape[1], _CUDNN_TILE)) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=used, implementation="cudnn")
    return out[:, :n]


def _permuted(x: Array, order: Array) -> Array:
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _splash(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Flash attention on a TPU: blocks of logits that never leave the chip's fast memory.

    Tokens are padded to whole vectors. Queries belong to segment 1, and so do keys except those
    that pad or that the mask excludes.
    """
    b, n, h, d = q.shape
    m, most = k.shape[1], _largest_block()
    rows, columns = _round_up(n, _LANES), _round_up(m, _LANES)
    keys = _block(columns, most)
    block: Any = {f"block_q{pass_}": _block(rows, most) for pass_ in ("", "_dkv", "_dq")}
    block |= {f"block_kv{pass_}": keys for pass_ in ("", "_dkv", "_dq")}
    block |= {f"block_kv{pass_}_compute": _block(keys, _SPLASH_BLOCK) for pass_ in ("", "_dkv")}
    full = splash_mask.MultiHeadMask([splash_mask.FullMask((rows, columns)) for _ in range(h)])
    kernel: Any = splash.make_splash_mha_single_device(full, block_sizes=splash.BlockSizes(**block))
    segments = None
    if mask is not None or columns > m:
        used = jnp.ones((b, m), jnp.int32) if mask is None else mask.astype(jnp.int32)
        used = jnp.pad(used, ((0, 0), (0, columns - m)))
        segments = splash.SegmentIds(q=jnp.ones((b, rows), jnp.int32), kv=used)

    def heads_first(x: Array, length: int) -> Float[Array, "b h {length} d"]:
        return _pad_tokens(x, length).swapaxes(1, 2)

    scaled = heads_first(q / np.sqrt(d).astype(q.dtype), rows)
    out = jax.vmap(kernel)(scaled, heads_first(k, columns), heads_first(v, columns), segments)
    return out.swapaxes(1, 2)[:, :n]


def _pad_tokens(x: Array, length: int) -> Float[Array, "b {length} h d"]:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def _round_up(length: int, multiple: int) -> int:
    """Return the next multiple."""
    return -(-length // multiple) * multiple


def _block(length: int, largest: int) -> int:
    """Return the largest multiple of `_LANES` up to `largest` that divides `length`."""
    return max(size for size in range(_LANES, largest + 1, _LANES) if length % size == 0)


def _largest_block() -> int:
    """Return the most rows and columns of a block on the chips of the traced program."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    kind = device.device_kind if device else jax.devices()[0].device_kind
    return next((size for name, size in _SPLASH_BLOCKS if kind.startswith(name)), _SPLASH_BLOCK)


def _in_blocks(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Attend with one block of queries of one head of one image at a time.

    All logits together do not fit the cache, and batched products are slow in XLA's CPU backend.
    """
    b, n, h, d = q.shape
    block = max(size for size in range(1, _CPU_BLOCK + 1) if n % size == 0)

    def head(qkv: tuple[Array, ...]) -> Array:
        q, k, v, *mask = qkv

        def some(q: Array) -> Array:
            logits = (q @ k.T).astype(jnp.float32) / math.sqrt(d)
            if mask:
                logits = jnp.where(mask[0], logits, _EXCLUDED)
            return jax.nn.softmax(logits, axis=-1).astype(v.dtype) @ v

        return jax.lax.map(some, q.reshape(n // block, block, d)).reshape(n, d)

    heads = tuple(x.swapaxes(1, 2).reshape(b * h, -1, d) for x in (q, k, v))
    if mask is not None:
        heads = (*heads, jnp.repeat(mask, h, axis=0))
    return jax.lax.map(head, heads).reshape(b, h, n, d).swapaxes(1, 2)


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys (Henry et al. 2020)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        source_width: int,
        rngs: nnx.Rngs,
        zero: bool = False,
        bias: bool = True,
        epsilon: float = 1e-6,
        interleaved: bool = False,
    ):
        """Initialise the layers.

        Args:
          width: of the output, and of x.
          heads: number of heads.
          source_width: of the source.
          rngs: random keys.
          zero: whether the last layer starts at zero.
          bias: whether it has one.
          epsilon: of the norms.
          interleaved: order of the channels that rotate together (`layers.apply_rope`).
        """
        self.heads, self.interleaved = heads, interleaved
        self.q = linear(width, width, rngs, axes=TO_HEADS, bias=False)
        self.k = linear(source_width, width, rngs, axes=TO_HEADS, bias=False)
        self.v = linear(source_width, width, rngs, axes=TO_HEADS, bias=False)
        self.out = linear(width, width, rngs, axes=FROM_HEADS, zero=zero, bias=bias)
        self.q_norm = nnx.RMSNorm(width // heads, epsilon=epsilon, rngs=rngs)
        self.k_norm = nnx.RMSNorm(width // heads, epsilon=epsilon, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        source: Float[Array, "b m e"],
        *,
        angles: Float[Array, "*b n half"] | None = None,
        mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Attend from x to the source where the mask is true; angles rotate queries and keys."""
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1)
            for y in (self.q(x), self.k(source), self.v(source))
        )
        q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
        if angles is not None:
            q, k = (apply_rope(y, angles, interleaved=self.interleaved) for y in (q, k))
        return self.out(attend(q, k, v, mask).reshape(x.shape))
