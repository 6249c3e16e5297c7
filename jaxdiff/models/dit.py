"""The diffusion transformer, on latents or, with large patches, on pixels.

Peebles & Xie 2023 (adaLN-zero), with RMSNorm, QK-norm, rotary positions and SwiGLU as in LightningDiT
(Yao et al. 2025) and JiT (Li & He 2025, arXiv 2511.13720). Text enters every block twice: its pooled vector
through the modulation, and its tokens through cross-attention or as extra tokens of the sequence.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxdiff.errors import UserError
from jaxdiff.models.layers import (
    Dense,
    Remat,
    TextFeatures,
    fourier_features,
    rotary_table,
    rotate,
    scan_blocks,
    stack_blocks,
)


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Size and shape of a DiT.

    Attributes:
      channels: of the input and the output; 3 for pixels, the autoencoder's for latents.
      patch_size: side of the square that becomes one token.
      bottleneck: width of a low-rank step in the patch embedding (JiT, section 4.2); None for none.
      width: of a token; a multiple of `heads`.
      depth: number of blocks.
      heads: of attention.
      mlp_ratio: hidden width of the SwiGLU over `width`; 8/3 costs what a plain MLP of 4 does.
      text_width: of the text encoder's tokens.
      pooled_width: of its pooled vector.
      text: "cross" attends to the text in every block; "joint" puts its tokens in the sequence.
      remat: what a block keeps for the backward pass.
    """

    channels: int = 3
    patch_size: int = 8
    bottleneck: int | None = None
    width: int = 256
    depth: int = 8
    heads: int = 4
    mlp_ratio: float = 8 / 3
    text_width: int = 128
    pooled_width: int = 128
    text: Literal["cross", "joint"] = "cross"
    remat: Remat = "none"

    def __post_init__(self):
        if self.width % (4 * self.heads):
            raise UserError(
                f"DiT: width {self.width} does not split into {self.heads} heads of a multiple of "
                "4 channels; choose width as a multiple of 4 x heads."
            )

    @property
    def hidden(self) -> int:
        """Hidden width of the SwiGLU, a multiple of 32 that vector units like."""
        return round(self.width * self.mlp_ratio / 32) * 32


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs, *, zero: bool = False, bias: bool = True):
    init = nnx.initializers.zeros if zero else nnx.initializers.xavier_uniform()
    return Dense(inputs, outputs, kernel_init=init, use_bias=bias, rngs=rngs)


def _modulate(x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]):
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys (Henry et al. 2020)."""

    def __init__(self, width: int, heads: int, *, source_width: int, rngs: nnx.Rngs, zero=False):
        self.heads = heads
        self.q = _linear(width, width, rngs, bias=False)
        self.k = _linear(source_width, width, rngs, bias=False)
        self.v = _linear(source_width, width, rngs, bias=False)
        self.out = _linear(width, width, rngs, zero=zero)
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
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1)
            for y in (self.q(x), self.k(source), self.v(source))
        )
        q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if mask is not None:
            mask = mask[:, None, None, :]
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return self.out(y.reshape(x.shape))


class SwiGLU(nnx.Module):
    """silu(x W1) * (x W2), then W3 (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate = _linear(width, hidden, rngs)
        self.up = _linear(width, hidden, rngs)
        self.down = _linear(hidden, width, rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DiTBlock(nnx.Module):
    """Self-attention, attention to the text, SwiGLU; the first and the last modulated and gated."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.modulation = _linear(width, 6 * width, rngs, zero=True)
        self.norm1 = nnx.RMSNorm(width, use_scale=False, rngs=rngs)
        self.attention = Attention(width, config.heads, source_width=width, rngs=rngs)
        if config.text == "cross":
            self.cross_norm = nnx.RMSNorm(width, rngs=rngs)
            self.cross = Attention(
                width, config.heads, source_width=config.text_width, rngs=rngs, zero=True
            )
        self.norm2 = nnx.RMSNorm(width, use_scale=False, rngs=rngs)
        self.mlp = SwiGLU(width, config.hidden, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        cond: Float[Array, "b d"],
        text: Float[Array, "b m e"],
        text_mask: Bool[Array, "b m"],
        angles: Float[Array, "n half"],
        mask: Bool[Array, "b n"] | None,
    ) -> Float[Array, "b n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(cond), 6, axis=-1)
        h = _modulate(self.norm1(x), shift1, scale1)
        x = x + gate1[:, None] * self.attention(h, h, angles=angles, mask=mask)
        if hasattr(self, "cross"):
            x = x + self.cross(self.cross_norm(x), text, mask=text_mask)
        return x + gate2[:, None] * self.mlp(_modulate(self.norm2(x), shift2, scale2))


class DiT(nnx.Module):
    """Predicts one quantity of the same shape as x_t; which one is the objective's affair."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, patch = config.width, config.patch_size**2 * config.channels
        if config.bottleneck is None:
            self.patch = _linear(patch, width, rngs)
        else:
            self.patch_down = _linear(patch, config.bottleneck, rngs, bias=False)
            self.patch = _linear(config.bottleneck, width, rngs)
        self.time1 = _linear(width, width, rngs)
        self.time2 = _linear(width, width, rngs)
        self.pooled = _linear(config.pooled_width, width, rngs)
        self.text_norm = nnx.RMSNorm(config.text_width, rngs=rngs)
        if config.text == "joint":
            self.text = _linear(config.text_width, width, rngs)
        self.blocks = stack_blocks(lambda rngs: DiTBlock(config, rngs=rngs), config.depth, rngs)
        self.final_norm = nnx.RMSNorm(width, use_scale=False, rngs=rngs)
        self.final_modulation = _linear(width, 2 * width, rngs, zero=True)
        self.final = _linear(width, patch, rngs, zero=True)

    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], text: TextFeatures
    ) -> Float[Array, "b h w c"]:
        """One evaluation; the compute type is that of the weights, the result float32.

        Args:
          x: noisy images or latents; h and w are multiples of the patch size.
          t: time in [0, 1].
          text: features of the prompts.

        Raises:
          UserError: if the patch size does not divide the image.
        """
        config, dtype = self.config, self.patch.kernel[...].dtype
        height, width = x.shape[1] // config.patch_size, x.shape[2] // config.patch_size
        tokens = _patchify(x.astype(dtype), config.patch_size)
        if config.bottleneck is not None:
            tokens = self.patch_down(tokens)
        positions = jnp.stack(jnp.mgrid[:height, :width], axis=-1).reshape(-1, 2)
        # Rotary positions are relative; where a thing stands in the picture needs absolute ones.
        tokens = self.patch(tokens) + _absolute_positions(positions, config.width).astype(dtype)
        angles = rotary_table(positions, config.width // config.heads)

        time = fourier_features(t, config.width).astype(dtype)
        cond = self.time2(jax.nn.silu(self.time1(time))) + self.pooled(text.pooled.astype(dtype))
        cond = jax.nn.silu(cond)
        words = self.text_norm(text.tokens.astype(dtype))

        mask = None
        if config.text == "joint":
            num_image = tokens.shape[1]
            tokens = jnp.concatenate([tokens, self.text(words)], axis=1)
            # Words have their order from the encoder: they stand unrotated.
            angles = jnp.pad(angles, ((0, words.shape[1]), (0, 0)))
            mask = jnp.pad(text.mask, ((0, 0), (num_image, 0)), constant_values=True)

        def call(block: DiTBlock, h):
            return block(h, cond, words, text.mask, angles, mask)

        tokens, _ = scan_blocks(self.blocks, tokens, call, remat=config.remat)
        if config.text == "joint":
            tokens = tokens[:, : height * width]
        shift, scale = jnp.split(self.final_modulation(cond), 2, axis=-1)
        out = self.final(_modulate(self.final_norm(tokens), shift, scale))
        return _unpatchify(out.astype(jnp.float32), height, width, config.patch_size)


def _absolute_positions(positions: Array, width: int) -> Float[Array, "n {width}"]:
    """Half the channels say the row, half the column (Dosovitskiy et al. 2021, 2D sin-cos)."""
    rows, columns = positions.astype(jnp.float32).T
    return jnp.concatenate(
        [fourier_features(axis, width // 2, scale=1.0) for axis in (rows, columns)], axis=-1
    )


def _patchify(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n d"]:
    b, h, w, c = x.shape
    if h % patch or w % patch:
        raise UserError(
            f"An image of {w}x{h} does not split into patches of {patch}; "
            f"choose a size that is a multiple of {patch}."
        )
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def _unpatchify(x: Float[Array, "b n d"], rows: int, columns: int, patch: int) -> Array:
    x = x.reshape(x.shape[0], rows, columns, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], rows * patch, columns * patch, -1)
