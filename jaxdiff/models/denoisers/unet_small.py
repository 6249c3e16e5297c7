"""A U-Net on pixels or latents (Ho et al. 2020), for data sets too small for a transformer.

Residual blocks are modulated by time and pooled text (Dhariwal & Nichol 2021, section 3), and at
the coarse levels positions attend to positions and text tokens together (Saharia et al. 2022,
Imagen, appendix B). Linear layers to and from patches avoid convolutions at full resolution
(Hoogeboom et al. 2023, section 3.2).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count
from jaxdiff.errors import UserError
from jaxdiff.models.attention import Attention, linear
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.convolutions import Conv
from jaxdiff.models.denoisers.base import Denoiser
from jaxdiff.models.flops import attention_flops, conv_flops, linear_flops, residual_block_flops
from jaxdiff.models.layers import (
    FROM_CHANNELS,
    TO_CHANNELS,
    Remat,
    absolute_positions,
    checkpoint,
    fourier_features,
    patchify,
    pooled_token_sum,
    unpatchify,
)
from jaxdiff.sampling.feature_cache import Shallow


@checked
@dataclass(frozen=True, kw_only=True)
class UNetConfig(Denoiser):
    """Size and shape of a U-Net.

    Attributes:
      channels: channels of the input and the output; 3 for pixels, the autoencoder's for latents.
      patch_size: side of the square of pixels that becomes one position of the finest level.
      widths: channels of each level, finest first; each next one halves the sides.
      blocks: residual blocks of each level on the way down, and again on the way up.
      attention: whether each level attends to itself and to the text.
      heads: number of attention heads; divides the width of every level that attends.
      groups: number of groups of the group norms; divides every width.
      text_width: width of the text encoder's tokens.
      pooled_width: width of the text encoder's pooled vector.
      remat: what a residual block keeps for the backward pass.
    """

    channels: Count = 3
    patch_size: Count = 4
    widths: tuple[Count, ...] = (64, 128, 192)
    blocks: Count = 1
    attention: tuple[bool, ...] = (False, True, True)
    heads: Count = 4
    groups: Count = 8
    text_width: Count = 128
    pooled_width: Count = 128
    remat: Remat = "none"

    def __post_init__(self):
        if len(self.attention) != len(self.widths):
            raise UserError(
                f"UNet: attention has {len(self.attention)} entries for {len(self.widths)} widths: "
                "expected one per level."
            )
        if any(width % self.groups or width % (2 * self.heads) for width in self.widths):
            raise UserError(
                f"UNet: widths are {self.widths}: expected multiples of {self.groups} groups and "
                f"of 2 x {self.heads} heads."
            )

    def build(self, *, rngs: nnx.Rngs) -> "UNet":
        """Initialise the network."""
        return UNet(self, rngs=rngs)

    @property
    def size_multiple(self) -> int:
        """Sides of an image must be multiples of this."""
        return self.patch_size * 2 ** (len(self.widths) - 1)

    def flops(self, *, height: int, width: int, text_length: int) -> float:
        """FLOPs of one evaluation on one image.

        Args:
          height: of the latents.
          width: likewise.
          text_length: tokens of the prompt, padding included.
        """
        widths, levels, cond = self.widths, len(self.widths), 4 * self.widths[0]
        areas = [height * width // self.patch_size**2 // 4**i for i in range(levels)]
        patch = self.patch_size**2 * self.channels

        def block(inputs: int, level: int) -> float:
            modulation = linear_flops(1, cond, 2 * widths[level])
            return residual_block_flops(inputs, widths[level], areas[level]) + modulation

        def attention(level: int) -> float:
            if not self.attention[level]:
                return 0.0
            area, d = areas[level], widths[level]
            projections = linear_flops(area, d, 4 * d) + linear_flops(text_length, d, 2 * d)
            words = linear_flops(text_length, self.text_width, d)
            return projections + words + attention_flops(area, area + text_length, d)

        total = 2 * linear_flops(1, cond, cond)
        total += linear_flops(1, self.pooled_width + self.text_width, cond)
        total += 2 * linear_flops(areas[0], patch, widths[0])
        total += linear_flops(areas[0], widths[0], widths[0])
        skips = [widths[0]]
        for i, d in enumerate(widths):
            inputs = [widths[max(i - 1, 0)]] + [d] * (self.blocks - 1)
            total += sum(block(n, i) for n in inputs) + attention(i)
            skips += [d] * self.blocks
            if i + 1 < levels:
                total += conv_flops(3, d, d, areas[i + 1])
        total += block(widths[-1], levels - 1) + attention(levels - 1)
        for i in reversed(range(levels)):
            before = widths[min(i + 1, levels - 1)]
            for j in range(self.blocks + (i == 0)):
                total += block((widths[i] if j else before) + skips.pop(), i)
            total += attention(i)
            total += conv_flops(3, widths[i], widths[i], areas[i - 1]) if i else 0.0
        return total


def _conv(inputs: int, outputs: int, rngs: nnx.Rngs, *, size: int = 3, stride: int = 1):
    # "Same" padding for sides that the stride divides, the odd position at the far side.
    sides = ((size - stride) // 2, (size - stride + 1) // 2)
    return Conv(inputs, outputs, size, stride, rngs, sides=(sides, sides))


class ResBlock(nnx.Module):
    """Two convolutions, each after a norm and SiLU; the second norm is modulated."""

    def __init__(self, inputs: int, width: int, cond: int, config: UNetConfig, rngs: nnx.Rngs):
        self.norm1 = nnx.GroupNorm(inputs, config.groups, rngs=rngs)
        self.conv1 = _conv(inputs, width, rngs)
        self.modulation = linear(cond, 2 * width, rngs)
        self.norm2 = nnx.GroupNorm(width, config.groups, rngs=rngs)
        self.conv2 = _conv(width, width, rngs)
        self.shortcut = None if inputs == width else _conv(inputs, width, rngs, size=1)

    @jax.named_scope("block")
    def __call__(
        self, x: Float[Array, "b h w c"], cond: Float[Array, "b d"]
    ) -> Float[Array, "b h w e"]:
        """Return the block's width at the same resolution."""
        y = self.conv1(jax.nn.silu(self.norm1(x).astype(x.dtype)))
        shift, scale = jnp.split(self.modulation(cond)[:, None, None], 2, axis=-1)
        y = self.norm2(y).astype(x.dtype) * (1 + scale) + shift
        y = self.conv2(jax.nn.silu(y))
        x = x if self.shortcut is None else self.shortcut(x)
        return (x + y) * 0.5**0.5  # keeps the variance over many blocks (Song et al. 2021, app. H)


class TextAttention(nnx.Module):
    """Attention from every position to all positions and text tokens."""

    def __init__(self, width: int, config: UNetConfig, rngs: nnx.Rngs):
        self.norm = nnx.GroupNorm(width, config.groups, rngs=rngs)
        self.text = linear(config.text_width, width, rngs)
        self.attention = Attention(width, config.heads, source_width=width, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], text: Conditioning) -> Float[Array, "b h w c"]:
        """Return the same shape."""
        b, h, w, c = x.shape
        y = self.norm(x).astype(x.dtype).reshape(b, h * w, c)
        assert text.tokens is not None
        source = jnp.concatenate([y, self.text(text.tokens)], axis=1)
        mask = text.mask
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (h * w, 0)), constant_values=True)
        return x + self.attention(y, source, mask=mask).reshape(x.shape)


class UNetLevel(nnx.Module):
    """The blocks of one level, in one direction."""

    def __init__(
        self, inputs: tuple[int, ...], level: int, cond: int, config: UNetConfig, rngs: nnx.Rngs
    ):
        width = config.widths[level]
        self.remat: Remat = config.remat
        self.blocks = nnx.List([ResBlock(n, width, cond, config, rngs) for n in inputs])
        attends = config.attention[level]
        self.attention = TextAttention(width, config, rngs) if attends else None

    def block(
        self, index: int, x: Float[Array, "b h w c"], cond: Float[Array, "b d"]
    ) -> Float[Array, "b h w e"]:
        """Apply one residual block."""
        graphdef, params = nnx.split(self.blocks[index])

        def run(params: Any, x: Array, cond: Array) -> Array:
            return nnx.merge(graphdef, params)(x, cond)

        return checkpoint(run, self.remat)(params, x, cond)

    def attend(self, x: Float[Array, "b h w c"], text: Conditioning) -> Float[Array, "b h w c"]:
        """Apply the attention, if the level has one."""
        return x if self.attention is None else self.attention(x, text)


class _Inputs(NamedTuple):
    """The first two skip connections, the time embedding and the text."""

    skips: tuple[Float[Array, "b i j d"], Float[Array, "b i j d"]]
    cond: Float[Array, "b e"]
    text: Conditioning


class UNet(nnx.Module):
    """The network; its prediction has the shape of x_t."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths, patch = config.widths, config.patch_size**2 * config.channels
        cond = 4 * widths[0]
        self.time1 = linear(cond, cond, rngs)
        self.time2 = linear(cond, cond, rngs)
        self.pooled = linear(config.pooled_width, cond, rngs)
        self.words = linear(config.text_width, cond, rngs)
        self.text_norm = nnx.RMSNorm(config.text_width, rngs=rngs)
        self.patch = linear(patch, widths[0], rngs, axes=FROM_CHANNELS)
        self.position = linear(widths[0], widths[0], rngs)

        self.down, self.down_convs = nnx.List(), nnx.List()
        skips = [widths[0]]
        for i, width in enumerate(widths):
            inputs = (widths[max(i - 1, 0)],) + (width,) * (config.blocks - 1)
            self.down.append(UNetLevel(inputs, i, cond, config, rngs))
            skips += [width] * config.blocks
            if i + 1 < len(widths):
                self.down_convs.append(_conv(width, width, rngs, stride=2))
        self.middle = UNetLevel((widths[-1],), len(widths) - 1, cond, config, rngs)
        self.up, self.up_convs = nnx.List(), nnx.List()
        for i, width in reversed(list(enumerate(widths))):
            before = widths[min(i + 1, len(widths) - 1)]
            last = config.blocks + (i == 0)  # the finest level also gets the stem's output
            inputs = tuple((width if j else before) + skips.pop() for j in range(last))
            self.up.append(UNetLevel(inputs, i, cond, config, rngs))
            if i > 0:
                self.up_convs.append(_conv(width, width, rngs))
        self.final_norm = nnx.GroupNorm(widths[0], config.groups, rngs=rngs)
        self.final = linear(widths[0], patch, rngs, axes=TO_CHANNELS, zero=True)

    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], text: Conditioning
    ) -> Float[Array, "b h w c"]:
        """Evaluate the network; it computes in the type of its weights, and returns float32.

        Args:
          x: noisy images or latents; h and w are multiples of `config.size_multiple`.
          t: time in [0, 1].
          text: its `tokens`, `mask` and `pooled`.

        Raises:
          UserError: sides are no multiples of `size_multiple`, or there is no text.
        """
        inputs = self.shallow(x, t, text).inputs
        return self.finish(inputs, self.deep(inputs))

    def shallow(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], text: Conditioning
    ) -> Shallow:
        """Embed the inputs and apply the first block (`sampling.feature_cache`)."""
        config, dtype = self.config, self.patch.kernel[...].dtype
        if x.shape[1] % config.size_multiple or x.shape[2] % config.size_multiple:
            raise UserError(
                f"An image of {x.shape[2]}x{x.shape[1]} does not fit the U-Net: expected sides "
                f"that are multiples of {config.size_multiple}."
            )
        rows, columns = x.shape[1] // config.patch_size, x.shape[2] // config.patch_size
        if text.tokens is None or text.pooled is None:
            raise UserError("A U-Net reads text: expected Conditioning.tokens and .pooled.")
        width = config.widths[0]
        time = fourier_features(t, 4 * width).astype(dtype)
        tokens = self.text_norm(text.tokens.astype(dtype)).astype(dtype)
        cond = self.time2(jax.nn.silu(self.time1(time))) + self.pooled(text.pooled.astype(dtype))
        cond = jax.nn.silu(cond + self.words(pooled_token_sum(tokens, text.mask)))
        text = text._replace(tokens=tokens)

        # Convolutions infer positions only from the borders; prompts name positions.
        places = jnp.stack(jnp.mgrid[:rows, :columns], axis=-1).reshape(-1, 2)
        h = self.patch(patchify(x.astype(dtype), config.patch_size))
        h = h + self.position(absolute_positions(places, width).astype(dtype))
        stem = h.reshape(-1, rows, columns, width)
        h = self._down(0, 0, stem, cond, text)
        return Shallow(h - stem, _Inputs((stem, h), cond, text))

    def _down(self, i: int, j: int, h: Array, cond: Array, text: Conditioning) -> Array:
        h = self.down[i].block(j, h, cond)
        return self.down[i].attend(h, text) if j + 1 == self.config.blocks else h

    def deep(self, inputs: _Inputs) -> Float[Array, "b i j d"]:
        """Return the input of the last two blocks."""
        skips, (cond, text) = list(inputs.skips), inputs[1:]
        h = skips[-1]
        for i in range(len(self.down)):
            for j in range(int(i == 0), self.config.blocks):
                h = self._down(i, j, h, cond, text)
                skips.append(h)
            if i + 1 < len(self.down):
                h = self.down_convs[i](h)
        h = self.middle.attend(self.middle.block(0, h, cond), text)
        for i, level in enumerate(self.up):
            for j in range(len(level.blocks)):
                if len(skips) == 2:
                    return h
                h = level.block(j, jnp.concatenate([h, skips.pop()], axis=-1), cond)
            h = level.attend(h, text)
            if i + 1 < len(self.up):
                h = self.up_convs[i](h.repeat(2, axis=1).repeat(2, axis=2))
        return h

    def finish(self, inputs: _Inputs, features: Float[Array, "b i j d"]) -> Float[Array, "b h w c"]:
        """Apply the last two blocks, and return the prediction."""
        (first, second), cond, text = inputs
        h, level = features, self.up[-1]
        for j, skip in ((-2, second), (-1, first)):
            h = level.block(j, jnp.concatenate([h, skip], axis=-1), cond)
        rows, columns, width = h.shape[1:]
        h = jax.nn.silu(self.final_norm(level.attend(h, text)).astype(h.dtype))
        out = self.final(h.reshape(-1, rows * columns, width)).astype(jnp.float32)
        return unpatchify(out, rows, columns, self.config.patch_size)
