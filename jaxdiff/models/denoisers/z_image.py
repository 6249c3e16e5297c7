"""Z-Image (Tongyi Lab 2025): image and caption tokens in one sequence of single-stream blocks.

Refiners, small stacks of blocks of their own, prepare the tokens of the image and of the caption.
Each sublayer is normalised before and after it. Modulation has scales and tanh gates, no shifts.

Both sequences are padded to multiples of 32 with learned tokens, which take part in attention. A
caption's length thus enters: its tokens have the places 1 .. p of the first rotary axis, p a
multiple of 32, and the image has p + 1. The batch has one shape: places follow from the mask, and
what lies beyond a caption's own padding is excluded from attention.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Positive
from jaxdiff.distributed.sharding import Axes
from jaxdiff.errors import UserError
from jaxdiff.models.attention import Attention, linear
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.base import Denoiser
from jaxdiff.models.denoisers.dit import SwiGLU
from jaxdiff.models.flops import attention_flops, linear_flops
from jaxdiff.models.initializers import normal
from jaxdiff.models.layers import (
    FROM_CHANNELS,
    TO_CHANNELS,
    Modulation,
    Remat,
    axial_angles,
    fourier_features,
    patchify,
    plain_layer_norm,
    scan_blocks,
    stack_blocks,
    unpatchify,
)
from jaxdiff.sampling.feature_cache import Shallow

PATCH = 2
"""Side of the square of latents that becomes one token."""

_QK_EPSILON = 1e-5
_FINAL_EPSILON = 1e-6
_MULTIPLE = 32  # of the lengths of both sequences
_SINUSOIDS, _TIME_HIDDEN, _TIME_WIDTH = 256, 1024, 256


@checked
@dataclass(frozen=True, kw_only=True)
class ZImageConfig(Denoiser):
    """Size of a Z-Image transformer; the defaults are the published ones.

    Attributes:
      channels: channels of the latents.
      heads: number of attention heads.
      depth: number of blocks.
      refiner_depth: number of blocks of each refiner.
      text_width: width of the text encoder's tokens.
      rope_axes: channels of a head that rotate with each axis: caption, row and column. Their sum
        is the width of a head.
      rope_lengths: number of places on each axis.
      rope_theta: base of the rotation's frequencies.
      time_scale: factor on the time, 0 at noise and 1 at data, in its sinusoidal features.
      eps: epsilon of the blocks' norms and the caption's; those of queries and keys have 1e-5.
      remat: what a block keeps for the backward pass.
    """

    channels: Count = 16
    heads: Count = 30
    depth: Count = 30
    refiner_depth: Count = 2
    text_width: Count = 2560
    rope_axes: tuple[Count, ...] = (32, 48, 48)
    rope_lengths: tuple[Count, ...] = (1024, 512, 512)
    rope_theta: Positive = 256.0
    time_scale: Positive = 1000.0
    eps: Positive = 1e-5
    remat: Remat = "none"

    def __post_init__(self):
        if len(self.rope_axes) != 3 or any(width % 2 for width in self.rope_axes):
            raise UserError(
                f"Z-Image: rope_axes are {self.rope_axes}: expected three even numbers, for the "
                "caption, rows and columns."
            )
        if len(self.rope_lengths) != 3:
            raise UserError(
                f"Z-Image: rope_lengths are {self.rope_lengths}: expected three numbers, for the "
                "caption, rows and columns."
            )

    def build(self, *, rngs: nnx.Rngs) -> "ZImage":
        """Initialise the network."""
        return ZImage(self, rngs=rngs)

    @property
    def size_multiple(self) -> int:
        """Sides of the latents must be multiples of this."""
        return PATCH

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.heads * sum(self.rope_axes)

    @property
    def hidden(self) -> int:
        """Hidden width of the SwiGLU."""
        return int(self.width / 3 * 8)

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return min(self.width, _TIME_WIDTH)

    @property
    def patch_channels(self) -> int:
        """Numbers in the patch that becomes one token."""
        return self.channels * PATCH**2

    def flops(self, *, height: int, width: int, text_length: int) -> float:
        """FLOPs of one evaluation on one image.

        Args:
          height: of the latents.
          width: likewise.
          text_length: tokens of the prompt, padding included.
        """
        d, patches = self.width, height // PATCH * (width // PATCH)
        image, text = _padded(patches), _padded(text_length)

        def blocks(depth: int, tokens: int, modulated: bool = True) -> float:
            one = linear_flops(tokens, d, 4 * d) + attention_flops(tokens, tokens, d)
            one += linear_flops(tokens, d, 3 * self.hidden)
            return depth * (one + (linear_flops(1, self.time_width, 4 * d) if modulated else 0.0))

        total = blocks(self.refiner_depth, image) + blocks(self.refiner_depth, text, False)
        total += blocks(self.depth, image + text)
        total += linear_flops(1, _SINUSOIDS, _TIME_HIDDEN)
        total += linear_flops(1, _TIME_HIDDEN, self.time_width)
        total += linear_flops(1, self.time_width, d)
        total += linear_flops(text_length, self.text_width, d)
        return total + 2 * linear_flops(patches, self.patch_channels, d)


def _padded(length: Any) -> Any:
    """Return the next multiple of 32 of a number or an array."""
    return -(-length // _MULTIPLE) * _MULTIPLE


class ZImageBlock(nnx.Module):
    """Attention and SwiGLU, each with an RMSNorm before and after it."""

    def __init__(self, config: ZImageConfig, *, modulated: bool, rngs: nnx.Rngs):
        width, eps = config.width, config.eps
        if modulated:
            zeros = nnx.initializers.zeros
            self.modulation = Modulation(config.time_width, 4 * width, kernel_init=zeros, rngs=rngs)
        self.norm1 = nnx.RMSNorm(width, epsilon=eps, rngs=rngs)
        self.attention = Attention(
            width,
            config.heads,
            source_width=width,
            bias=False,
            epsilon=_QK_EPSILON,
            interleaved=True,
            rngs=rngs,
        )
        self.norm2 = nnx.RMSNorm(width, epsilon=eps, rngs=rngs)
        self.norm3 = nnx.RMSNorm(width, epsilon=eps, rngs=rngs)
        self.mlp = SwiGLU(width, config.hidden, bias=False, rngs=rngs)
        self.norm4 = nnx.RMSNorm(width, epsilon=eps, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        vector: Float[Array, "b e"] | None,
        angles: Float[Array, "b n half"],
        mask: Bool[Array, "b n"] | None,
    ) -> Float[Array, "b n d"]:
        """Return the same shape; `vector` embeds the time, for blocks that are modulated."""
        scale1, gate1, scale2, gate2 = 1.0, 1.0, 1.0, 1.0
        if vector is not None:
            scale1, gate1, scale2, gate2 = jnp.split(self.modulation(vector)[:, None], 4, axis=-1)
            scale1, scale2, gate1, gate2 = 1 + scale1, 1 + scale2, jnp.tanh(gate1), jnp.tanh(gate2)
        h = self.norm1(x) * scale1
        x = x + gate1 * self.norm2(self.attention(h, h, angles=angles, mask=mask))
        return x + gate2 * self.norm4(self.mlp(self.norm3(x) * scale2))


class _Inputs(NamedTuple):
    """What the blocks and the last layer read: image tokens, then caption tokens."""

    tokens: Float[Array, "b n d"]
    vector: Float[Array, "b e"]
    angles: Float[Array, "b n half"]
    mask: Bool[Array, "b n"] | None
    rows: int
    columns: int

    def call(self, block: ZImageBlock, tokens: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Apply a block to tokens."""
        return block(tokens, self.vector, self.angles, self.mask)


class _Caption(NamedTuple):
    """Captions of one padded length.

    Attributes:
      tokens: of the text encoder.
      given: true for tokens of the text, false for padding.
      places: of the tokens, from 0; those of the text come first.
      lengths: number of tokens with a caption's own padding.
    """

    tokens: Float[Array, "b m e"]
    given: Bool[Array, "b m"] | None
    places: Int[Array, "b m"]
    lengths: Int[Array, " b"]


class ZImage(nnx.Module):
    """The network; its prediction has the shape of x_t."""

    def __init__(self, config: ZImageConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, patch, zeros = config.width, config.patch_channels, nnx.initializers.zeros
        pad: Axes = ("position", "embed")
        self.patch = linear(patch, width, rngs, axes=FROM_CHANNELS)
        self.image_pad = nnx.Param(normal(0.02)(rngs(), (1, width)), axes=pad)
        self.text_norm = nnx.RMSNorm(config.text_width, epsilon=config.eps, rngs=rngs)
        self.text = linear(config.text_width, width, rngs)
        self.text_pad = nnx.Param(normal(0.02)(rngs(), (1, width)), axes=pad)
        self.time1 = linear(_SINUSOIDS, _TIME_HIDDEN, rngs)
        self.time2 = linear(_TIME_HIDDEN, config.time_width, rngs)

        def stack(depth: int, *, modulated: bool) -> ZImageBlock:
            return stack_blocks(
                lambda rngs: ZImageBlock(config, modulated=modulated, rngs=rngs), depth, rngs
            )

        self.image_refiner = stack(config.refiner_depth, modulated=True)
        self.text_refiner = stack(config.refiner_depth, modulated=False)
        self.blocks = stack(config.depth, modulated=True)
        self.final_norm = plain_layer_norm(width, _FINAL_EPSILON, rngs)
        self.final_modulation = Modulation(config.time_width, width, kernel_init=zeros, rngs=rngs)
        self.final = linear(width, patch, rngs, axes=TO_CHANNELS, zero=True)

    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Conditioning
    ) -> Float[Array, "b h w c"]:
        """Evaluate the network; it computes in the type of its weights, and returns float32.

        Args:
          x: noisy latents; h and w are multiples of `PATCH`.
          t: time in [0, 1].
          cond: its `tokens` and `mask`, in any order of text and padding.

        Returns:
          The velocity eps - x0.

        Raises:
          UserError: the latents do not split into patches or are too large, or there is no text.
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
        """Embed the inputs and apply the refiners."""
        config, dtype = self.config, self.patch.kernel[...].dtype
        caption = self._caption(cond)
        rows, columns = x.shape[1] // PATCH, x.shape[2] // PATCH
        self._check_places(caption.places.shape[1] + 2, rows, columns)
        time = fourier_features(1 - t, _SINUSOIDS, scale=config.time_scale).astype(dtype)
        vector = self.time2(jax.nn.silu(self.time1(time)))

        tokens = self.patch(patchify(x.astype(dtype), PATCH))
        image_angles = self._angles(self._image_positions(caption.lengths, rows, columns))
        padding = image_angles.shape[1] - tokens.shape[1]
        pads = jnp.broadcast_to(self.image_pad[...], (len(x), padding, config.width))
        image = _Inputs(
            jnp.concatenate([tokens, pads], axis=1), vector, image_angles, None, rows, columns
        )
        refined, _ = scan_blocks(self.image_refiner, image.tokens, image.call, remat=config.remat)

        words = self.text(self.text_norm(caption.tokens.astype(dtype)))
        if caption.given is not None:
            words = jnp.where(caption.given[..., None], words, self.text_pad[...])
        places = jnp.pad(1 + caption.places[..., None], ((0, 0), (0, 0), (0, 2)))
        angles, mask = self._angles(places), None
        if cond.mask is not None:
            mask = caption.places < caption.lengths[:, None]
        words, _ = scan_blocks(
            self.text_refiner,
            words,
            lambda block, words: block(words, None, angles, mask),
            remat=config.remat,
        )
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (refined.shape[1], 0)), constant_values=True)
        return image._replace(
            tokens=jnp.concatenate([refined, words], axis=1),
            angles=jnp.concatenate([image_angles, angles], axis=1),
            mask=mask,
        )

    def _caption(self, cond: Conditioning) -> _Caption:
        if cond.tokens is None:
            raise UserError("Z-Image reads text: expected Conditioning.tokens.")
        count, length = cond.tokens.shape[:2]
        padding = _padded(length) - length
        tokens = jnp.pad(cond.tokens, ((0, 0), (0, padding), (0, 0)))
        if cond.mask is None and not padding:
            places = jnp.broadcast_to(jnp.arange(length), (count, length))
            return _Caption(tokens, None, places, jnp.full(count, length))
        mask = jnp.ones((count, length), bool) if cond.mask is None else cond.mask
        given = jnp.pad(mask, ((0, 0), (0, padding)))
        lengths = jnp.sum(given, axis=1, keepdims=True)
        places = jnp.where(given, jnp.cumsum(given, axis=1), lengths + jnp.cumsum(~given, axis=1))
        return _Caption(tokens, given, places - 1, _padded(lengths[:, 0]))

    def _check_places(self, *counts: int) -> None:
        """Raise `UserError` for more places than the rotary positions have."""
        names, limits = ("captions", "rows", "columns"), self.config.rope_lengths
        for name, count, limit in zip(names, counts, limits, strict=True):
            if count > limit:
                raise UserError(
                    f"Z-Image: the {name} need {count} positions: expected at most {limit}; use "
                    "smaller images or shorter prompts."
                )

    def _image_positions(
        self, lengths: Int[Array, " b"], rows: int, columns: int
    ) -> Int[Array, "b n 3"]:
        """Return the positions of image tokens, padded with zeros."""
        count = rows * columns
        grid = jnp.stack(jnp.mgrid[:rows, :columns], axis=-1).reshape(count, 2)
        grid = jnp.broadcast_to(grid, (len(lengths), count, 2))
        first = jnp.broadcast_to(1 + lengths[:, None, None], (len(lengths), count, 1))
        positions = jnp.concatenate([first, grid], axis=-1)
        return jnp.pad(positions, ((0, 0), (0, _padded(count) - count), (0, 0)))

    def _angles(self, positions: Int[Array, "b n 3"]) -> Float[Array, "b n half"]:
        return axial_angles(positions, self.config.rope_axes, self.config.rope_theta)

    def _project(self, tokens: Float[Array, "b n d"], inputs: _Inputs) -> Float[Array, "b h w c"]:
        rows, columns = inputs.rows, inputs.columns
        scale = self.final_modulation(jax.nn.silu(inputs.vector))[:, None]
        out = self.final(self.final_norm(tokens[:, : rows * columns]) * (1 + scale))
        return -unpatchify(out.astype(jnp.float32), rows, columns, PATCH)
