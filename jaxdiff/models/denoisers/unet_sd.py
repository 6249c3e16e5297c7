"""Stable Diffusion's U-Net, in the structure of its checkpoints: 1.x, 2.x, XL base, XL refiner.

Rombach et al. 2022, section 3.3 (the network and its attention to text); Podell et al. 2023,
sections 2.1 and 2.2 (XL: deep transformers at the coarse levels, conditions on size and crop).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Natural
from jaxdiff.errors import UserError
from jaxdiff.models.attention import attend
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.convolutions import Conv, GroupNorm, ResidualBlock, conv, fan_in_linear
from jaxdiff.models.denoisers.base import Denoiser
from jaxdiff.models.flops import attention_flops, conv_flops, linear_flops, residual_block_flops
from jaxdiff.models.initializers import fan_in_normal
from jaxdiff.models.layers import (
    FROM_HEADS,
    FROM_MLP,
    TO_HEADS,
    TO_MLP,
    Remat,
    UnitDense,
    fourier_features,
    scan_blocks,
    stack_blocks,
)
from jaxdiff.sampling.feature_cache import Shallow

NORM_EPSILON = 1e-5
TRANSFORMER_NORM_EPSILON = 1e-6


@checked
@dataclass(frozen=True, kw_only=True)
class UNet2DConditionConfig(Denoiser):
    """Size and shape of Stable Diffusion's U-Net; the defaults are those of 1.x.

    Attributes:
      in_channels: channels of the input; 9 for inpainting: latents, mask, masked latents.
      out_channels: channels of the output.
      block_out_channels: one width for each level, finest first; each next one halves the sides.
      layers_per_block: residual blocks of a level on the way down; one more on the way up.
      transformer_layers: transformer blocks after each residual block of a level; 0 for none.
      middle_transformer_layers: transformer blocks in the middle, at least one.
      heads: number of attention heads of each level; the middle has those of the last. diffusers'
        configs call it `attention_head_dim`.
      cross_attention_dim: width of the text's tokens.
      use_linear_projection: linear layers in and out of a transformer rather than 1x1 convolutions.
      upcast_attention: queries and keys in float32 whatever the compute type.
      norm_num_groups: number of groups of the group norms; divides every width.
      added_width: width of pooled vector and embeddings of size and crop, concatenated (XL: 1280
        + 6 x 256, its refiner 1280 + 5 x 256); None for networks without these inputs.
      time_id_width: width of the embedding of each number of size and crop.
      num_train_steps: number of steps of the training schedule; t = 1 is the last.
      remat: what a residual block and a transformer block keep for the backward pass.
    """

    in_channels: Count = 4
    out_channels: Count = 4
    block_out_channels: tuple[Count, ...] = (320, 640, 1280, 1280)
    layers_per_block: Count = 2
    transformer_layers: tuple[Natural, ...] = (1, 1, 1, 0)
    middle_transformer_layers: Natural = 1
    heads: tuple[Count, ...] = (8, 8, 8, 8)
    cross_attention_dim: Count = 768
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: Count = 32
    added_width: Count | None = None
    time_id_width: Count = 256
    num_train_steps: Count = 1000
    remat: Remat = "none"

    def __post_init__(self):
        widths = self.block_out_channels
        if not len(widths) == len(self.transformer_layers) == len(self.heads):
            raise UserError(
                f"UNet2DCondition: {len(widths)} block_out_channels, "
                f"{len(self.transformer_layers)} transformer_layers and {len(self.heads)} heads: "
                "expected one of each per level."
            )
        if self.in_channels not in (self.out_channels, 2 * self.out_channels + 1):
            raise UserError(
                f"UNet2DCondition: in_channels is {self.in_channels} for {self.out_channels} "
                f"out_channels: expected {self.out_channels}, or {2 * self.out_channels + 1} with "
                "the mask and masked latents of inpainting; use another model."
            )
        for width, heads in zip(widths, self.heads, strict=True):
            if width % self.norm_num_groups or width % heads:
                raise UserError(
                    f"UNet2DCondition: block_out_channels has {width}: expected multiples of "
                    f"{self.norm_num_groups} norm groups and of {heads} heads."
                )

    @property
    def text_width(self) -> int:
        """Width of the text's tokens."""
        return self.cross_attention_dim

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.out_channels

    @property
    def extra_channels(self) -> int:
        """Channels of the input beyond the latents: a mask and masked latents."""
        return self.in_channels - self.out_channels

    @property
    def wraps(self) -> bool:
        """True: it has no position embeddings."""
        return True

    def build(self, *, rngs: nnx.Rngs) -> "UNet2DConditionModel":
        """Initialise the network."""
        return UNet2DConditionModel(self, rngs=rngs)

    def flops(self, *, height: int, width: int, text_length: int) -> float:
        """FLOPs of one evaluation on one image.

        Args:
          height: of the latents; it halves at each level without a remainder.
          width: likewise.
          text_length: tokens of the prompt, padding included.
        """
        widths, time = self.block_out_channels, self.time_width
        last = len(widths) - 1
        areas = [height * width // 4**i for i in range(len(widths))]

        def block(inputs: int, level: int) -> float:
            convolutions = residual_block_flops(inputs, widths[level], areas[level])
            return convolutions + linear_flops(1, time, widths[level])

        def transformer(level: int, depth: int) -> float:
            if depth == 0:
                return 0.0
            area, d = areas[level], widths[level]
            attention = linear_flops(area, d, 4 * d) + attention_flops(area, area, d)
            cross = linear_flops(area, d, 2 * d) + attention_flops(area, text_length, d)
            cross += linear_flops(text_length, self.cross_attention_dim, 2 * d)
            mlp = linear_flops(area, d, 8 * d) + linear_flops(area, 4 * d, d)
            return linear_flops(area, d, 2 * d) + depth * (attention + cross + mlp)

        total = linear_flops(1, widths[0], time) + linear_flops(1, time, time)
        if self.added_width is not None:
            total += linear_flops(1, self.added_width, time) + linear_flops(1, time, time)
        total += conv_flops(3, self.in_channels, widths[0], areas[0])
        total += conv_flops(3, widths[0], self.out_channels, areas[0])
        skips, before = [widths[0]], widths[0]
        for i, d in enumerate(widths):
            for _ in range(self.layers_per_block):
                total += block(before, i) + transformer(i, self.transformer_layers[i])
                skips.append(before := d)
            if i < last:
                total += conv_flops(3, d, d, areas[i + 1])
                skips.append(d)
        total += 2 * block(before, last) + transformer(last, self.middle_transformer_layers)
        for i, d in reversed(list(enumerate(widths))):
            for _ in range(self.layers_per_block + 1):
                total += block(before + skips.pop(), i) + transformer(i, self.transformer_layers[i])
                before = d
            total += conv_flops(3, d, d, areas[i - 1]) if i else 0.0
        return total


class CrossAttention(nnx.Module):
    """Multi-head attention from x to a source, which may be x."""

    def __init__(self, width: int, source_width: int, heads: int, upcast: bool, rngs: nnx.Rngs):
        self.heads, self.upcast = heads, upcast
        self.q = fan_in_linear(width, width, rngs, axes=TO_HEADS, bias=False)
        self.k = fan_in_linear(source_width, width, rngs, axes=TO_HEADS, bias=False)
        self.v = fan_in_linear(source_width, width, rngs, axes=TO_HEADS, bias=False)
        self.out = fan_in_linear(width, width, rngs, axes=FROM_HEADS)

    def __call__(
        self, x: Float[Array, "b n d"], source: Float[Array, "b m e"]
    ) -> Float[Array, "b n d"]:
        """Attend from each position of x to the source."""
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1)
            for y in (self.q(x), self.k(source), self.v(source))
        )
        if self.upcast:
            q, k, v = (y.astype(jnp.float32) for y in (q, k, v))
        y = attend(q, k, v).astype(x.dtype)
        return self.out(y.reshape(x.shape))


class GEGLU(nnx.Module):
    """(x W) * gelu(x V), then another linear layer (Shazeer 2020)."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        init = fan_in_normal()
        self.inner = UnitDense(width, 8 * width, units=2, axes=TO_MLP, kernel_init=init, rngs=rngs)
        self.outer = fan_in_linear(4 * width, width, rngs, axes=FROM_MLP)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Return the same shape."""
        pair = self.inner.split(x)
        x, gate = pair[..., 0, :], pair[..., 1, :]
        return self.outer(x * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention, GEGLU, each after a norm and with a residual."""

    def __init__(self, width: int, heads: int, config: UNet2DConditionConfig, rngs: nnx.Rngs):
        upcast = config.upcast_attention
        self.norm1, self.norm2, self.norm3 = (
            nnx.LayerNorm(width, epsilon=NORM_EPSILON, use_fast_variance=False, rngs=rngs)
            for _ in range(3)
        )
        self.attention = CrossAttention(width, width, heads, upcast, rngs)
        self.cross = CrossAttention(width, config.cross_attention_dim, heads, upcast, rngs)
        self.mlp = GEGLU(width, rngs)

    def __call__(
        self, x: Float[Array, "b n d"], tokens: Float[Array, "b m e"]
    ) -> Float[Array, "b n d"]:
        """Return the same shape."""
        y = self.norm1(x).astype(x.dtype)
        x = x + self.attention(y, y)
        x = x + self.cross(self.norm2(x).astype(x.dtype), tokens)
        return x + self.mlp(self.norm3(x).astype(x.dtype))


class Transformer(nnx.Module):
    """Transformer blocks over all positions, with a residual around them."""

    def __init__(
        self, width: int, depth: int, heads: int, config: UNet2DConditionConfig, rngs: nnx.Rngs
    ):
        self.remat: Remat = config.remat
        self.norm = GroupNorm(width, config.norm_num_groups, TRANSFORMER_NORM_EPSILON, rngs)
        if config.use_linear_projection:
            self.proj_in = fan_in_linear(width, width, rngs)
            self.proj_out = fan_in_linear(width, width, rngs)
        else:
            self.proj_in, self.proj_out = conv(width, width, 1, rngs), conv(width, width, 1, rngs)
        self.blocks = stack_blocks(
            lambda rngs: TransformerBlock(width, heads, config, rngs), depth, rngs
        )

    def __call__(
        self, x: Float[Array, "b h w c"], tokens: Float[Array, "b m e"]
    ) -> Float[Array, "b h w c"]:
        """Return the same shape."""
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        y, _ = scan_blocks(self.blocks, y, lambda block, y: block(y, tokens), remat=self.remat)
        return x + self.proj_out(y.reshape(b, h, w, c))


class SdLevel(nnx.Module):
    """The residual blocks of one resolution in one direction, each with its transformer, if any."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        level: int,
        resample: Conv | None,
        config: UNet2DConditionConfig,
        rngs: nnx.Rngs,
    ):
        width, depth = config.block_out_channels[level], config.transformer_layers[level]
        self.blocks = nnx.List(_block(channels, width, config, rngs) for channels in inputs)
        self.transformers = nnx.List(
            Transformer(width, depth, config.heads[level], config, rngs)
            for _ in (inputs if depth else ())
        )
        self.resample = resample

    def step(
        self,
        index: int,
        x: Float[Array, "b h w c"],
        time: Float[Array, "b d"],
        tokens: Float[Array, "b m e"],
    ) -> Float[Array, "b h w f"]:
        """Apply one residual block and its transformer."""
        x = self.blocks[index](x, time)
        return self.transformers[index](x, tokens) if self.transformers else x


class SdMiddle(nnx.Module):
    """Residual block, transformer, residual block, at the coarsest resolution."""

    def __init__(self, config: UNet2DConditionConfig, rngs: nnx.Rngs):
        width, depth = config.block_out_channels[-1], config.middle_transformer_layers
        self.first = _block(width, width, config, rngs)
        self.transformer = Transformer(width, depth, config.heads[-1], config, rngs)
        self.second = _block(width, width, config, rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, "b d"],
        tokens: Float[Array, "b m e"],
    ) -> Float[Array, "b h w c"]:
        """Return the same shape."""
        return self.second(self.transformer(self.first(x, time), tokens), time)


def _block(inputs: int, outputs: int, config: UNet2DConditionConfig, rngs: nnx.Rngs):
    return ResidualBlock(
        inputs,
        outputs,
        groups=config.norm_num_groups,
        epsilon=NORM_EPSILON,
        time_width=config.time_width,
        remat=config.remat,
        rngs=rngs,
    )


class _Inputs(NamedTuple):
    """The first two skip connections, the time embedding and the text's tokens."""

    skips: tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]
    time: Float[Array, "b d"]
    tokens: Float[Array, "b m e"]


class UNet2DConditionModel(nnx.Module):
    """The network; its prediction has the shape of the latents."""

    def __init__(self, config: UNet2DConditionConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths, time_width = config.block_out_channels, config.time_width
        self.conv_in = conv(config.in_channels, widths[0], 3, rngs)
        self.time1 = fan_in_linear(widths[0], time_width, rngs)
        self.time2 = fan_in_linear(time_width, time_width, rngs)
        if config.added_width is not None:
            self.added1 = fan_in_linear(config.added_width, time_width, rngs)
            self.added2 = fan_in_linear(time_width, time_width, rngs)

        self.down, skips = nnx.List(), [widths[0]]
        for i, width in enumerate(widths):
            last = i + 1 == len(widths)
            inputs = (widths[max(i - 1, 0)],) + (width,) * (config.layers_per_block - 1)
            down = None if last else Conv(width, width, 3, 2, rngs)
            self.down.append(SdLevel(inputs, i, down, config, rngs))
            skips += [width] * (config.layers_per_block + (not last))
        self.middle = SdMiddle(config, rngs)
        self.up, before = nnx.List(), widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            first = (before,) + (width,) * config.layers_per_block
            inputs = tuple(channels + skips.pop() for channels in first)
            up = conv(width, width, 3, rngs) if i else None
            self.up.append(SdLevel(inputs, i, up, config, rngs))
            before = width
        self.norm_out = GroupNorm(widths[0], config.norm_num_groups, NORM_EPSILON, rngs)
        self.conv_out = conv(widths[0], config.out_channels, 3, rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Conditioning
    ) -> Float[Array, "b h w e"]:
        """Evaluate the network; it computes in the type of its weights, and returns float32.

        Args:
          x: noisy latents of a variance-preserving schedule.
          t: time in [0, 1]; (i + 1) / num_train_steps is training step i, counted from 0.
          cond: its `tokens`; `concat` where the input has extra channels; XL's networks also read
            `pooled` and `size_crop`, and the refiner `aesthetic_score`.

        Raises:
          UserError: a required field is missing.
        """
        inputs = self.shallow(x, t, cond).inputs
        return self.finish(inputs, self.deep(inputs))

    def shallow(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Conditioning
    ) -> Shallow:
        """Embed the inputs and apply the first block (`sampling.feature_cache`)."""
        if cond.tokens is None:
            raise UserError("This U-Net reads text: expected Conditioning.tokens.")
        dtype = self.conv_in.kernel.dtype
        time = self._time(t, cond, dtype)
        tokens = cond.tokens.astype(dtype)
        if cond.concat is not None:
            x = jnp.concatenate([x, cond.concat.astype(x.dtype)], axis=-1)
        stem = self.conv_in(x.astype(dtype))
        x = self.down[0].step(0, stem, time, tokens)
        return Shallow(x - stem, _Inputs((stem, x), time, tokens))

    def deep(self, inputs: _Inputs) -> Float[Array, "b h w c"]:
        """Return the input of the last two blocks."""
        skips, (time, tokens) = list(inputs.skips), inputs[1:]
        x = skips[-1]
        for depth, level in enumerate(self.down):
            for i in range(int(depth == 0), len(level.blocks)):
                x = level.step(i, x, time, tokens)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        x = self.middle(x, time, tokens)
        for level in self.up:
            for i in range(len(level.blocks)):
                if len(skips) == 2:
                    return x
                x = level.step(i, jnp.concatenate([x, skips.pop()], axis=-1), time, tokens)
            if level.resample is not None:
                x = level.resample(_upsample(x, *skips[-1].shape[1:3]))
        return x

    def finish(self, inputs: _Inputs, features: Float[Array, "b h w c"]) -> Float[Array, "b h w e"]:
        """Apply the last two blocks, and return the prediction."""
        (first, second), time, tokens = inputs
        x, level = features, self.up[-1]
        for i, skip in ((-2, second), (-1, first)):
            x = level.step(i, jnp.concatenate([x, skip], axis=-1), time, tokens)
        return self.conv_out(jax.nn.silu(self.norm_out(x))).astype(jnp.float32)

    def _time(self, t: Float[Array, " b"], cond: Conditioning, dtype: jnp.dtype) -> Array:
        """Embed the time and, for XL, the pooled prompt, size and crop, for every block."""
        config = self.config
        step = jnp.maximum(t.astype(jnp.float32) * config.num_train_steps - 1, 0.0)
        features = fourier_features(step, config.block_out_channels[0], scale=1.0)
        time = self.time2(jax.nn.silu(self.time1(features.astype(dtype))))
        if config.added_width is None:
            return time
        added = jnp.zeros((t.shape[0], 0))
        if cond.pooled is not None and cond.size_crop is not None:
            ids = fourier_features(
                self._time_ids(cond).reshape(-1), config.time_id_width, scale=1.0
            )
            added = jnp.concatenate(
                [cond.pooled.astype(jnp.float32), ids.reshape(t.shape[0], -1)], axis=-1
            )
        if added.shape[1] != config.added_width:
            raise UserError(
                f"The pooled prompt, size and crop have {added.shape[1]} channels: expected "
                f"{config.added_width}; give pooled and size_crop of this checkpoint."
            )
        return time + self.added2(jax.nn.silu(self.added1(added.astype(dtype))))

    def _time_ids(self, cond: Conditioning) -> Float[Array, "b k"]:
        """Size, crop and target size (base), or size, crop and aesthetic score (refiner)."""
        assert cond.pooled is not None
        assert cond.size_crop is not None
        numbers = cond.size_crop.astype(jnp.float32)
        assert self.config.added_width is not None
        count = (self.config.added_width - cond.pooled.shape[-1]) // self.config.time_id_width
        if count == numbers.shape[1] or cond.aesthetic_score is None:
            return numbers
        return jnp.concatenate([numbers[:, :4], cond.aesthetic_score[:, None]], axis=-1)


def _upsample(x: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b H W c"]:
    """Upsample by nearest neighbours to the size of the skip connection: twice, or one less."""
    h, w = x.shape[1:3]
    if (height, width) == (2 * h, 2 * w):
        return x.repeat(2, axis=1).repeat(2, axis=2)
    return x[:, jnp.arange(height) * h // height][:, :, jnp.arange(width) * w // width]
