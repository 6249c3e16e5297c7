"""Qwen3 (Yang et al. 2025) as a text encoder: hidden states of some of its layers.

    x <- x + attention(norm(x)),   x <- x + down(silu(gate(norm(x))) * up(norm(x)))

Attention is causal. Several query heads share one head of keys and values (Ainslie et al. 2023);
queries and keys are RMS-normalised in each head, then rotated by their position. Blocks above the
last hidden state that is read are neither built nor loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Natural, Positive
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
    apply_rope,
    scan_blocks,
    stack_blocks,
)
from jaxdiff.models.text_encoders.base import LanguageModelEncoder


@checked
@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Size of a Qwen3; the defaults are those of Qwen3-4B.

    Attributes:
      vocab_size: number of token ids.
      width: width of a token.
      depth: number of blocks of the published model.
      heads: number of heads of queries; a multiple of `kv_heads`.
      kv_heads: number of heads of keys and values.
      head_dim: width of a head, an even number.
      mlp_width: hidden width of the MLP.
      rope_theta: wavelength factor of the rotary embeddings.
      norm_epsilon: epsilon of all norms.
    """

    vocab_size: Count = 151936
    width: Count = 2560
    depth: Count = 36
    heads: Count = 32
    kv_heads: Count = 8
    head_dim: Count = 128
    mlp_width: Count = 9728
    rope_theta: Positive = 1e6
    norm_epsilon: Positive = 1e-6

    def __post_init__(self):
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise UserError(
                f"Qwen3: {self.heads} heads of {self.head_dim} channels share {self.kv_heads} "
                "kv_heads: expected heads that are a multiple of kv_heads, and an even head_dim."
            )


def _dense(inputs: int, outputs: int, axes: Axes, rngs: nnx.Rngs) -> Dense:
    return Dense(
        inputs, outputs, axes=axes, use_bias=False, kernel_init=normal(inputs**-0.5), rngs=rngs
    )


class Qwen3Attention(nnx.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        width, size, epsilon = config.width, config.head_dim, config.norm_epsilon
        self.head_dim = size
        self.q = _dense(width, config.heads * size, TO_HEADS, rngs)
        self.k = _dense(width, config.kv_heads * size, TO_HEADS, rngs)
        self.v = _dense(width, config.kv_heads * size, TO_HEADS, rngs)
        self.out = _dense(config.heads * size, width, FROM_HEADS, rngs)
        self.q_norm = nnx.RMSNorm(size, epsilon=epsilon, rngs=rngs)
        self.k_norm = nnx.RMSNorm(size, epsilon=epsilon, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], angles: Float[Array, "n half"], mask: Bool[Array, "b n"]
    ) -> Float[Array, "b n d"]:
        """Attend to the token itself and to earlier ones where the mask is true.

        A token without any, of padding on the left, receives zeros, as in PyTorch's
        `scaled_dot_product_attention`.
        """
        heads = *x.shape[:2], -1, self.head_dim
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        q = apply_rope(self.q_norm(q).astype(x.dtype), angles)
        k = apply_rope(self.k_norm(k).astype(x.dtype), angles)
        keys = mask[:, None, None, :]
        out = jax.nn.dot_product_attention(q, k, v, mask=keys, is_causal=True)
        some = jnp.cumsum(mask, axis=1) > 0
        return self.out(jnp.where(some[..., None], out.reshape(*x.shape[:2], -1), 0))


class Qwen3Block(nnx.Module):
    """Attention and a gated MLP, each after an RMS norm and with a residual around it."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        width, hidden, epsilon = config.width, config.mlp_width, config.norm_epsilon
        self.attention_norm = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.attention = Qwen3Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.gate = _dense(width, hidden, TO_MLP, rngs)
        self.up = _dense(width, hidden, TO_MLP, rngs)
        self.down = _dense(hidden, width, FROM_MLP, rngs)

    def __call__(
        self, x: Float[Array, "b n d"], angles: Float[Array, "n half"], mask: Bool[Array, "b n"]
    ) -> Float[Array, "b n d"]:
        """Return the same shape."""
        x = x + self.attention(self.attention_norm(x).astype(x.dtype), angles, mask)
        y = self.mlp_norm(x).astype(x.dtype)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Qwen3(nnx.Module):
    """The blocks up to the last hidden state that is read."""

    def __init__(self, config: Qwen3Config, hidden_layers: tuple[int, ...], *, rngs: nnx.Rngs):
        self.config, self.hidden_layers = config, hidden_layers
        tokens = normal(0.02)(rngs.params(), (config.vocab_size, config.width))
        self.token_embedding = nnx.Param(tokens, axes=("vocab", "embed"))
        depth = hidden_layers[-1]
        self.blocks = stack_blocks(lambda rngs: Qwen3Block(config, rngs), depth, rngs)
        if depth == config.depth:
            self.final_norm = nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)

    def __call__(
        self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]
    ) -> tuple[Float[Array, "b n d"], ...]:
        """Encode token ids, padded on either side where the mask is false.

        Returns:
          One array for each of `hidden_layers`, counted as in transformers: 0 is the embeddings,
          `config.depth` the output of the last block after the final norm. In the weights' type.
        """
        table = self.token_embedding[...]
        # An id beyond the vocabulary becomes NaN rather than its neighbour.
        x = jnp.take(table, ids, axis=0, mode="fill")
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angles = jnp.arange(ids.shape[1], dtype=jnp.float32)[:, None] * frequencies
        states = []
        for first, last in pairwise((0, *self.hidden_layers)):
            if last > first:
                x, _ = scan_blocks(
                    self.blocks, x, lambda block, x: block(x, angles, mask), span=(first, last)
                )
            final = last == self.config.depth
            states.append(self.final_norm(x).astype(x.dtype) if final else x)
        return tuple(states)


@checked
@dataclass(frozen=True, kw_only=True)
class Qwen3TextEncoder(LanguageModelEncoder):
    """A Qwen3, the hidden states that the denoiser reads, and the form of its prompts.

    Attributes:
      model: the network's size.
      hidden_layers: which hidden states are joined by channel, counted as `Qwen3.__call__` does, in
        ascending order.
      max_length: tokens of a prompt, those of the chat template and padding included.
      thinking: whether the chat template lets the model think, transformers' `enable_thinking`.
    """

    reads_mask: ClassVar[bool] = True
    model: Qwen3Config
    hidden_layers: tuple[Natural, ...]
    max_length: Count = 512
    thinking: bool = False

    def __post_init__(self):
        layers, depth = self.hidden_layers, self.model.depth
        ascending = all(a < b for a, b in pairwise(layers))
        if not layers or not ascending or not 1 <= layers[-1] <= depth:
            raise UserError(
                f"Qwen3: hidden_layers are {list(layers)}: expected ascending numbers, the last "
                f"from 1 to the {depth} of model.depth."
            )

    @property
    def joined_width(self) -> int:
        """Width of the joined hidden states."""
        return len(self.hidden_layers) * self.width

    def build(self, *, rngs: nnx.Rngs) -> Qwen3:
        """Initialise the network."""
        return Qwen3(self.model, self.hidden_layers, rngs=rngs)

    def flops(self) -> float:
        """FLOPs of one prompt, padding included."""
        model, n = self.model, self.length
        heads = model.heads * model.head_dim
        block = linear_flops(n, model.width, 2 * (heads + model.kv_heads * model.head_dim))
        block += attention_flops(n, n, heads) + linear_flops(n, model.width, 3 * model.mlp_width)
        return self.hidden_layers[-1] * block

    def encode(
        self,
        params: Mapping[str, Any],
        name: str,
        ids: Int[Array, "b n"],
        mask: Bool[Array, "b n"],
    ) -> Float[Array, "b n {self.joined_width}"]:
        """Encode token ids with the parameters of the encoder `name` of a model."""
        return jnp.concatenate(self.module(params, name)(ids, mask), axis=-1)
