"""Multi-head attention with the fastest kernel of each kind of device.

  NVIDIA  cuDNN's flash attention, in bfloat16 or float16 with heads of at most 128 channels
  TPU     splash attention, for long sequences
  CPU     blocks of queries, for long sequences
  else    XLA, which materializes the logits

A kernel works on one device. Under the mesh of the traced program, queries are sharded over images,
heads and, where tokens are split, tokens; keys and values are then gathered.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxdiff.distributed.sharding import Axes, traced_mesh
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
# A TPU uses splash attention from this many logits on; below it XLA is faster.
_MIN_SPLASH_LOGITS = 2**20
_LANES = 128  # of a TPU's vector unit; block lengths are multiples of it


@jax.named_scope("attention")
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
    """Attend on one device, with its fastest kernel."""
    if mask is not None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
    kernels: dict[str, Callable[..., Array]] = {}
    if q.shape[1] * k.shape[1] >= _MIN_CPU_LOGITS:
        kernels["cpu"] = _in_blocks
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
        and math.prod(lengths) >= _MIN_SPLASH_LOGITS
        and all(length % _LANES == 0 for length in lengths)
        and q.dtype in (jnp.bfloat16, jnp.float32)
    )


def _for_cudnn(q: Array, k: Array) -> bool:
    """Whether cuDNN applies; only a process with a GPU can trace it."""
    return (
        jax.default_backend() == "gpu"
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[3] <= 128
        and q.shape[3] % 8 == 0
        and q.shape[1] % 64 == 0
        and k.shape[1] % 64 == 0
    )


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    """NVIDIA's flash attention (Dao et al. 2022)."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _splash(q: Array, k: Array, v: Array) -> Array:
    """Flash attention on a TPU: blocks of logits that never leave the chip's fast memory."""
    n, h, m = q.shape[1], q.shape[2], k.shape[1]
    block: Any = {f"block_q{pass_}": _block(n) for pass_ in ("", "_dkv", "_dq")}
    block |= {f"block_kv{pass_}": _block(m) for pass_ in ("", "_dkv", "_dq")}
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((n, m)) for _ in range(h)])
    kernel: Any = splash.make_splash_mha_single_device(mask, block_sizes=splash.BlockSizes(**block))
    scaled = (q / np.sqrt(q.shape[3]).astype(q.dtype)).swapaxes(1, 2)
    return jax.vmap(kernel)(scaled, k.swapaxes(1, 2), v.swapaxes(1, 2)).swapaxes(1, 2)


def _block(length: int) -> int:
    """Return the largest power of two from 128 to 512 that divides `length`."""
    return max(size for size in (_LANES, 2 * _LANES, 4 * _LANES) if length % size == 0)


def _in_blocks(q: Array, k: Array, v: Array) -> Array:
    """Attend with one block of queries of one head of one image at a time.

    All logits together do not fit the cache, and batched products are slow in XLA's CPU backend.
    """
    b, n, h, d = q.shape
    block = max(size for size in range(1, _CPU_BLOCK + 1) if n % size == 0)

    def head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv

        def some(q: Array) -> Array:
            logits = (q @ k.T).astype(jnp.float32) / math.sqrt(d)
            return jax.nn.softmax(logits, axis=-1).astype(v.dtype) @ v

        return jax.lax.map(some, q.reshape(n // block, block, d)).reshape(n, d)

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
        """Attend from x to the source where the mask is true; angles rotate queries and keys."""
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1)
            for y in (self.q(x), self.k(source), self.v(source))
        )
        q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
        if angles is not None:
            q, k = apply_rope(q, angles), apply_rope(k, angles)
        return self.out(attend(q, k, v, mask).reshape(x.shape))
