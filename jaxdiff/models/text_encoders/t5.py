"""The encoder of T5 v1.1 (Raffel et al. 2020; Shazeer 2020 for the gated MLP).

    x <- x + attention(norm(x)),   x <- x + out(gelu(gate(norm(x))) * in(norm(x)))

Attention has no scale and no rotation: a bias by relative position is added to the logits, the same
in all blocks. Norms are RMS norms.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Positive
from jaxdiff.distributed.sharding import Axes
from jaxdiff.errors import UserError
from jaxdiff.models.flops import attention_flops, linear_flops
from jaxdiff.models.initializers import normal
from jaxdiff.models.layers import (
    FROM_HEADS,
    FROM_MLP,
    TO_HEADS,
    TO_MLP,
    Dense,
    scan_blocks,
    stack_blocks,
)
from jaxdiff.models.text_encoders.base import LanguageModelEncoder


@checked
@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Size of a T5 v1.1 encoder; the defaults are those of XXL.

    Attributes:
      vocab_size: number of token ids.
      width: width of a token.
      depth: number of blocks.
      heads: number of attention heads.
      head_dim: width of a head.
      mlp_width: hidden width of the MLP.
      buckets: number of relative positions that attention distinguishes, a multiple of 4.
      max_distance: distances from here on, in tokens, are in one bucket.
      norm_epsilon: epsilon of all norms.
    """

    vocab_size: Count = 32128
    width: Count = 4096
    depth: Count = 24
    heads: Count = 64
    head_dim: Count = 64
    mlp_width: Count = 10240
    buckets: Count = 32
    max_distance: Count = 128
    norm_epsilon: Positive = 1e-6

    def __post_init__(self):
        if self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise UserError(
                f"T5: {self.buckets} buckets for distances up to {self.max_distance}: expected a "
                "multiple of 4, and a max_distance above a quarter of it."
            )


def position_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "n n"]:
    """Return the bucket of each pair of positions, query and key (Raffel et al. 2020, section 2.1).

    Half of the buckets are for keys after the query. Of each half, the first half are for single
    distances, the others for logarithmically growing ranges of them.
    """
    positions = np.arange(length)
    relative = positions[None, :] - positions[:, None]
    half, exact = buckets // 2, buckets // 4
    distance = np.abs(relative).astype(np.float32)
    scale = np.float32(math.log(max_distance / exact))
    growth = np.log(np.maximum(distance, 1) / np.float32(exact)) / scale * np.float32(half - exact)
    large = np.minimum(exact + growth.astype(np.int32), half - 1)
    bucket = np.where(distance < exact, distance.astype(np.int32), large)
    return np.where(relative > 0, bucket + half, bucket).astype(np.int32)


def _dense(inputs: int, outputs: int, axes: Axes, rngs: nnx.Rngs, std: float | None = None):
    init = normal(std or inputs**-0.5)
    return Dense(inputs, outputs, axes=axes, use_bias=False, kernel_init=init, rngs=rngs)


class T5Attention(nnx.Module):
    """Self-attention between all tokens, with a bias on the logits."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        width, inner = config.width, config.heads * config.head_dim
        self.head_dim = config.head_dim
        self.q = _dense(width, inner, TO_HEADS, rngs, (width * config.head_dim) ** -0.5)
        self.k = _dense(width, inner, TO_HEADS, rngs)
        self.v = _dense(width, inner, TO_HEADS, rngs)
        self.out = _dense(inner, width, FROM_HEADS, rngs)

    def __call__(
        self, x: Float[Array, "b n d"], bias: Float[Array, "1 h n n"], mask: Bool[Array, "b n"]
    ) -> Float[Array, "b n d"]:
        """Attend to the tokens where the mask is true."""
        heads = *x.shape[:2], -1, self.head_dim
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        keys = mask[:, None, None, :]
        out = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=keys, scale=1.0)
        return self.out(out.reshape(*x.shape[:2], -1))


class T5Block(nnx.Module):
    """Attention and a gated MLP, each after an RMS norm and with a residual around it."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        width, hidden, epsilon = config.width, config.mlp_width, config.norm_epsilon
        self.attention_norm = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.attention = T5Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.gate = _dense(width, hidden, TO_MLP, rngs)
        self.up = _dense(width, hidden, TO_MLP, rngs)
        self.down = _dense(hidden, width, FROM_MLP, rngs)

    def __call__(
        self, x: Float[Array, "b n d"], bias: Float[Array, "1 h n n"], mask: Bool[Array, "b n"]
    ) -> Float[Array, "b n d"]:
        """Return the same shape."""
        x = x + self.attention(self.attention_norm(x).astype(x.dtype), bias, mask)
        y = self.mlp_norm(x).astype(x.dtype)
        return x + self.down(jax.nn.gelu(self.gate(y), approximate=True) * self.up(y))


class T5Encoder(nnx.Module):
    """Token embeddings, blocks and a final norm."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        tokens = normal(1.0)(rngs.params(), (config.vocab_size, config.width))
        self.token_embedding = nnx.Param(tokens, axes=("vocab", "embed"))
        bias = normal(config.width**-0.5)(rngs.params(), (config.buckets, config.heads))
        self.position_bias = nnx.Param(bias, axes=("position", "heads"))
        self.blocks = stack_blocks(lambda rngs: T5Block(config, rngs), config.depth, rngs)
        self.final_norm = nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)

    def __call__(
        self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        """Encode token ids, in the type of the weights.

        Args:
          ids: token ids, padded on either side.
          mask: true for the tokens that others attend to; None: all of them, padding included.
        """
        config, n = self.config, ids.shape[1]
        # An id beyond the vocabulary becomes NaN rather than its neighbour.
        x = jnp.take(self.token_embedding[...], ids, axis=0, mode="fill")
        buckets = position_buckets(n, config.buckets, config.max_distance)
        bias = jnp.take(self.position_bias[...], buckets, axis=0).transpose(2, 0, 1)[None]
        keys = jnp.ones(ids.shape, bool) if mask is None else mask
        x, _ = scan_blocks(self.blocks, x, lambda block, x: block(x, bias, keys))
        return self.final_norm(x).astype(x.dtype)


@checked
@dataclass(frozen=True, kw_only=True)
class T5TextEncoder(LanguageModelEncoder):
    """A T5 encoder that attends to padding too, as in diffusers' pipelines of FLUX.1.

    Attributes:
      model: the network's size.
      max_length: tokens of a prompt, the end and padding included.
    """

    model: T5Config
    max_length: Count = 512

    def build(self, *, rngs: nnx.Rngs) -> T5Encoder:
        """Initialise the network."""
        return T5Encoder(self.model, rngs=rngs)

    def flops(self) -> float:
        """FLOPs of one prompt, padding included."""
        model, n = self.model, self.length
        heads = model.heads * model.head_dim
        block = linear_flops(n, model.width, 4 * heads) + attention_flops(n, n, heads)
        return model.depth * (block + linear_flops(n, model.width, 3 * model.mlp_width))

    def encode(
        self, params: Mapping[str, Any], name: str, ids: Int[Array, "b n"]
    ) -> Float[Array, "b n d"]:
        """Encode token ids with the parameters of the encoder `name` of a model."""
        return self.module(params, name)(ids)
