"""Multi-head attention, by the best kernel of each kind of device, as the networks use it.

  NVIDIA  cuDNN's flash attention, in bfloat16 or float16 with heads of at most 128 channels
  TPU     splash attention, where there are too many logits to write them down
  CPU     piece by piece, likewise
  else    XLA, which writes the logits down

A kernel works on what one device has. So under a mesh (that of the program that is traced) queries
are shared out over images, heads and, where tokens are split, over these; keys and values are then
gathered, and nothing else is exchanged.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxdiff.distributed.sharding import Axes, traced_mesh
from jaxdiff.models.layers import EMBED, FROM_HEADS, TO_HEADS, Dense, apply_rope


def linear(
    inputs: int,
    outputs: int,
    rngs: nnx.Rngs,
    *,
    axes: Axes = EMBED,
    zero: bool = False,
    bias: bool = True,
) -> Dense:
    """A linear layer with Xavier's initialisation, or one that starts at zero."""
    init = nnx.initializers.zeros if zero else nnx.initializers.xavier_uniform()
    return Dense(inputs, outputs, axes=axes, kernel_init=init, use_bias=bias, rngs=rngs)


# On a CPU, from this many products of queries and keys on, they are taken piece by piece: on two
# cores 4096 positions of 8 heads (Stable Diffusion at 512 pixels) take 0.7 s instead of 4.5.
_MANY, _PIECE = 2**18, 256
# On a TPU, from this many on, they are not written down; below it XLA's products are faster.
_TOO_MANY = 2**20
_LANES = 128  # of a TPU's vector unit: what the lengths of a block are multiples of


def attend(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v for each head, over the keys where the mask is true."""
    mesh = traced_mesh()
    if mesh is None or (mesh.shape["context"] == 1 and not _for_splash(q, k, mask)):
        return _attend(q, k, v, mask)
    axes = [axis for axis in ("data", "fsdp") if axis in mesh.shape]
    images = tuple(axes) if q.shape[0] % math.prod(mesh.shape[a] for a in axes) == 0 else None
    heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None
    tokens = "context" if q.shape[1] % mesh.shape["context"] == 0 else None
    queries, keys = PartitionSpec(images, tokens, heads), PartitionSpec(images, None, heads)
    shared: list[Any] = [queries, keys, keys]
    inputs: list[Any] = [q, k, v]
    if mask is not None:
        shared, inputs = [*shared, PartitionSpec(images)], [*inputs, mask]
    local = jax.shard_map(
        _attend, mesh=mesh, in_specs=tuple(shared), out_specs=queries, check_vma=False
    )
    return local(*inputs)


def _attend(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """What one device has, by what is quickest on its kind."""
    if mask is not None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
    kernels: dict[str, Callable[..., Array]] = {}
    if q.shape[1] * k.shape[1] >= _MANY:
        kernels["cpu"] = _piece_by_piece
    if _for_splash(q, k, mask):
        kernels["tpu"] = _splash
    if _for_cudnn(q, k):
        kernels["cuda"] = _cudnn
    if not kernels:
        return jax.nn.dot_product_attention(q, k, v)
    return jax.lax.platform_dependent(q, k, v, default=jax.nn.dot_product_attention, **kernels)


def _for_splash(q: Array, k: Array, mask: Array | None) -> bool:
    lengths = q.shape[1], k.shape[1]
    return (
        mask is None
        and math.prod(lengths) >= _TOO_MANY
        and all(length % _LANES == 0 for length in lengths)
        and q.dtype in (jnp.bfloat16, jnp.float32)
    )


def _for_cudnn(q: Array, k: Array) -> bool:
    """Tracing it takes a GPU, so that it cannot be one of several kernels elsewhere."""
    return (
        jax.default_backend() == "gpu"
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[3] <= 128
        and q.shape[3] % 8 == 0
        and q.shape[1] % 64 == 0
        and k.shape[1] % 64 == 0
    )


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    """Flash attention (Dao et al. 2022) as NVIDIA has it."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _splash(q: Array, k: Array, v: Array) -> Array:
    """Flash attention on a TPU: blocks of logits that never leave the chip's fast memory."""
    n, h, m = q.shape[1], q.shape[2], k.shape[1]
    block: Any = {
        "block_q": _block(n),
        "block_kv": _block(m),
        "block_q_dkv": _block(n),
        "block_kv_dkv": _block(m),
        "block_q_dq": _block(n),
        "block_kv_dq": _block(m),
    }
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((n, m)) for _ in range(h)])
    kernel: Any = splash.make_splash_mha_single_device(mask, block_sizes=splash.BlockSizes(**block))
    scaled = (q / np.sqrt(q.shape[3]).astype(q.dtype)).swapaxes(1, 2)
    return jax.vmap(kernel)(scaled, k.swapaxes(1, 2), v.swapaxes(1, 2)).swapaxes(1, 2)


def _block(length: int) -> int:
    """The longest of its divisors that are powers of two, from 128 to 512."""
    return max(size for size in (_LANES, 2 * _LANES, 4 * _LANES) if length % size == 0)


def _piece_by_piece(q: Array, k: Array, v: Array) -> Array:
    """One head of one image, and a few of its queries, at a time.

    All logits at once are slow to reach, and XLA's CPU backend is slow at batches of products.
    """
    b, n, h, d = q.shape
    piece = max(size for size in range(1, _PIECE + 1) if n % size == 0)

    def head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv

        def some(q: Array) -> Array:
            logits = (q @ k.T).astype(jnp.float32) / math.sqrt(d)
            return jax.nn.softmax(logits, axis=-1).astype(v.dtype) @ v

        return jax.lax.map(some, q.reshape(n // piece, piece, d)).reshape(n, d)

    q, k, v = (x.swapaxes(1, 2).reshape(b * h, -1, d) for x in (q, k, v))
    return jax.lax.map(head, (q, k, v)).reshape(b, h, n, d).swapaxes(1, 2)


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys (Henry et al. 2020)."""

    def __init__(self, width: int, heads: int, *, source_width: int, rngs: nnx.Rngs, zero=False):
        self.heads = heads
        self.q = linear(width, width, rngs, axes=TO_HEADS, bias=False)
        self.k = linear(source_width, width, rngs, axes=TO_HEADS, bias=False)
        self.v = linear(source_width, width, rngs, axes=TO_HEADS, bias=False)
        self.out = linear(width, width, rngs, axes=FROM_HEADS, zero=zero)
        self.q_norm = nnx.RMSNorm(width // heads, rngs=rngs)
        self.k_norm = nnx.RMSNorm(width // heads, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        source: Float[Array, "b m e"],
        *,
        angles: Float[Array, "n half"] | None = None,
        mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b n d"]:
        """x, the queries, reads the source where the mask is true; angles turn queries and keys."""
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1)
            for y in (self.q(x), self.k(source), self.v(source))
        )
        q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
        if angles is not None:
            q, k = apply_rope(q, angles), apply_rope(k, angles)
        return self.out(attend(q, k, v, mask).reshape(x.shape))
