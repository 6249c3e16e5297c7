"""The diffusion transformer, on latents or, with large patches, on pixels.

Peebles & Xie 2023 (adaLN-zero), with RMSNorm, QK-norm, rotary positions and SwiGLU as in
LightningDiT (Yao et al. 2025) and JiT (Li & He 2025, arXiv 2511.13720). Text enters every block
twice: its pooled vector through the modulation, and its tokens through cross-attention or as extra
tokens of the sequence.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Positive
from jaxdiff.errors import UserError
from jaxdiff.models.attention import Attention, linear
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.base import Denoiser
from jaxdiff.models.flops import attention_flops, linear_flops
from jaxdiff.models.layers import (
    FROM_CHANNELS,
    FROM_MLP,
    TO_CHANNELS,
    TO_MLP,
    Modulation,
    Remat,
    absolute_positions,
    fourier_features,
    modulate,
    patchify,
    pooled_token_sum,
    rotary_table,
    scan_blocks,
    stack_blocks,
    unpatchify,
)
from jaxdiff.sampling.feature_cache import Shallow


@checked
@dataclass(frozen=True, kw_only=True)
class DiTConfig(Denoiser):
    """Size and shape of a DiT.

    Attributes:
      channels: channels of the input and the output; 3 for pixels, the autoencoder's for latents.
      patch_size: side of the square that becomes one token.
      bottleneck: width of a low-rank step in the patch embedding (JiT, section 4.2); None for none.
      width: width of a token; a multiple of `heads`.
      depth: number of blocks.
      heads: number of attention heads.
      mlp_ratio: hidden width of the SwiGLU over `width`; 8/3 costs what a plain MLP of 4 does.
      text_width: width of the text encoder's tokens.
      pooled_width: width of the text encoder's pooled vector.
      text: "cross" attends to the text in every block; "joint" puts its tokens in the sequence.
      remat: what a block keeps for the backward pass.
    """

    channels: Count = 3
    patch_size: Count = 8
    bottleneck: Count | None = None
    width: Count = 256
    depth: Count = 8
    heads: Count = 4
    mlp_ratio: Positive = 8 / 3
    text_width: Count = 128
    pooled_width: Count = 128
    text: Literal["cross", "joint"] = "cross"
    remat: Remat = "none"

    def __post_init__(self):
        if self.width % (4 * self.heads):
            raise UserError(
                f"DiT: width {self.width} does not split into {self.heads} heads: expected a "
                "multiple of 4 x heads."
            )

    def build(self, *, rngs: nnx.Rngs) -> "DiT":
        """Initialise the network."""
        return DiT(self, rngs=rngs)

    @property
    def size_multiple(self) -> int:
        """Sides of an image must be multiples of this."""
        return self.patch_size

    @property
    def hidden(self) -> int:
        """Hidden width of the SwiGLU, rounded to a multiple of 32."""
        return round(self.width * self.mlp_ratio / 32) * 32

    def flops(self, *, height: int, width: int, text_length: int) -> float:
        """FLOPs of one evaluation on one image.

        Args:
          height: of the latents.
          width: likewise.
          text_length: tokens of the prompt, padding included.
        """
        d, hidden = self.width, self.hidden
        patch = self.patch_size**2 * self.channels
        n = height // self.patch_size * (width // self.patch_size)
        joint = self.text == "joint"
        length = n + text_length if joint else n

        block = linear_flops(1, d, 6 * d)  # modulation
        block += linear_flops(length, d, 4 * d) + attention_flops(length, length, d)
        block += linear_flops(length, d, 3 * hidden)  # SwiGLU
        if not joint:  # q and out on the image, k and v on the text
            block += linear_flops(n, d, 2 * d) + linear_flops(text_length, self.text_width, 2 * d)
            block += attention_flops(n, text_length, d)

        if self.bottleneck is None:
            ends = linear_flops(n, patch, d)
        else:
            ends = linear_flops(n, patch, self.bottleneck) + linear_flops(n, self.bottleneck, d)
        ends += linear_flops(1, d, 2 * d)  # time
        ends += linear_flops(1, self.pooled_width + self.text_width, d)
        ends += linear_flops(1, d, 2 * d) + linear_flops(n, d, patch)  # final modulation and layer
        if joint:
            ends += linear_flops(text_length, self.text_width, d)
        return self.depth * block + ends


class SwiGLU(nnx.Module):
    """silu(x W1) * (x W2), then W3 (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, bias: bool = True):
        self.gate = linear(width, hidden, rngs, axes=TO_MLP, bias=bias)
        self.up = linear(width, hidden, rngs, axes=TO_MLP, bias=bias)
        self.down = linear(hidden, width, rngs, axes=FROM_MLP, bias=bias)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Return the same shape."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DiTBlock(nnx.Module):
    """Self-attention, cross-attention, SwiGLU; the first and the last modulated and gated."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        width = config.width
        zeros = nnx.initializers.zeros
        self.modulation = Modulation(width, 6 * width, kernel_init=zeros, rngs=rngs)
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
        text_mask: Bool[Array, "b m"] | None,
        angles: Float[Array, "n half"],
        mask: Bool[Array, "b n"] | None,
    ) -> Float[Array, "b n d"]:
        """Return the same shape; `cond` embeds time and pooled text, `text` is the tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(cond), 6, axis=-1)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1[:, None] * self.attention(h, h, angles=angles, mask=mask)
        if hasattr(self, "cross"):
            x = x + self.cross(self.cross_norm(x), text, mask=text_mask)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class _Inputs(NamedTuple):
    """What the blocks and the last layer read."""

    tokens: Float[Array, "b n d"]
    vector: Float[Array, "b d"]
    words: Float[Array, "b m e"]
    word_mask: Bool[Array, "b m"] | None
    angles: Float[Array, "n half"]
    mask: Bool[Array, "b n"] | None
    rows: int
    columns: int

    def call(self, block: DiTBlock, tokens: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Apply a block to tokens."""
        return block(tokens, self.vector, self.words, self.word_mask, self.angles, self.mask)


class DiT(nnx.Module):
    """The network; its prediction has the shape of x_t."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, patch = config.width, config.patch_size**2 * config.channels
        if config.bottleneck is None:
            self.patch = linear(patch, width, rngs, axes=FROM_CHANNELS)
        else:
            self.patch_down = linear(patch, config.bottleneck, rngs, axes=FROM_CHANNELS, bias=False)
            self.patch = linear(config.bottleneck, width, rngs)
        self.time1 = linear(width, width, rngs)
        self.time2 = linear(width, width, rngs)
        self.pooled = linear(config.pooled_width, width, rngs)
        self.words = linear(config.text_width, width, rngs)
        self.text_norm = nnx.RMSNorm(config.text_width, rngs=rngs)
        if config.text == "joint":
            self.text = linear(config.text_width, width, rngs)
        self.blocks = stack_blocks(lambda rngs: DiTBlock(config, rngs=rngs), config.depth, rngs)
        self.final_norm = nnx.RMSNorm(width, use_scale=False, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.final_modulation = Modulation(width, 2 * width, kernel_init=zeros, rngs=rngs)
        self.final = linear(width, patch, rngs, axes=TO_CHANNELS, zero=True)

    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Conditioning
    ) -> Float[Array, "b h w c"]:
        """Evaluate the network; it computes in the type of its weights, and returns float32.

        Args:
          x: noisy images or latents; h and w are multiples of the patch size.
          t: time in [0, 1].
          cond: its `tokens`, `mask` and `pooled`.

        Raises:
          UserError: the patch size does not divide the image, or there is no text.
        """
        inputs = self._embed(x, t, cond)
        tokens, _ = scan_blocks(self.blocks, inputs.tokens, inputs.call, remat=self.config.remat)
        return self._project(tokens, inputs)

    def shallow(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Conditioning
    ) -> Shallow:
        """Embed the inputs and apply the first block (`sampling.feature_cache`)."""
        inputs = self._embed(x, t, cond)
        tokens, _ = scan_blocks(self.blocks, inputs.tokens, inputs.call, span=(0, 1))
        return Shallow(tokens - inputs.tokens, inputs._replace(tokens=tokens))

    def deep(self, inputs: _Inputs) -> Float[Array, "b n d"]:
        """Return what all other blocks add to the tokens."""
        span = (1, self.config.depth)
        tokens, _ = scan_blocks(self.blocks, inputs.tokens, inputs.call, span=span)
        return tokens - inputs.tokens

    def finish(self, inputs: _Inputs, features: Float[Array, "b n d"]) -> Float[Array, "b h w c"]:
        """Return the prediction."""
        return self._project(inputs.tokens + features, inputs)

    def _embed(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Conditioning
    ) -> _Inputs:
        config, dtype = self.config, self.patch.kernel[...].dtype
        if cond.tokens is None or cond.pooled is None:
            raise UserError(
                "A DiT reads text: expected Conditioning.tokens and Conditioning.pooled."
            )
        height, width = x.shape[1] // config.patch_size, x.shape[2] // config.patch_size
        tokens = patchify(x.astype(dtype), config.patch_size)
        if config.bottleneck is not None:
            tokens = self.patch_down(tokens)
        positions = jnp.stack(jnp.mgrid[:height, :width], axis=-1).reshape(-1, 2)
        # Rotary positions are relative; placing objects in the image needs absolute ones.
        tokens = self.patch(tokens) + absolute_positions(positions, config.width).astype(dtype)
        angles = rotary_table(positions, config.width // config.heads)

        time = fourier_features(t, config.width).astype(dtype)
        vector = self.time2(jax.nn.silu(self.time1(time))) + self.pooled(cond.pooled.astype(dtype))
        words = self.text_norm(cond.tokens.astype(dtype)).astype(dtype)
        vector = jax.nn.silu(vector + self.words(pooled_token_sum(words, cond.mask)))

        mask = None
        if config.text == "joint":
            num_image = tokens.shape[1]
            tokens = jnp.concatenate([tokens, self.text(words)], axis=1)
            # Text tokens already encode their order: they are not rotated.
            angles = jnp.pad(angles, ((0, words.shape[1]), (0, 0)))
            if cond.mask is not None:
                mask = jnp.pad(cond.mask, ((0, 0), (num_image, 0)), constant_values=True)

        return _Inputs(tokens, vector, words, cond.mask, angles, mask, height, width)

    def _project(self, tokens: Float[Array, "b n d"], inputs: _Inputs) -> Float[Array, "b h w c"]:
        rows, columns = inputs.rows, inputs.columns
        if self.config.text == "joint":
            tokens = tokens[:, : rows * columns]
        shift, scale = jnp.split(self.final_modulation(inputs.vector), 2, axis=-1)
        out = self.final(modulate(self.final_norm(tokens), shift, scale))
        return unpatchify(out.astype(jnp.float32), rows, columns, self.config.patch_size)
