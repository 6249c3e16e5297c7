"""Stable Diffusion's KL autoencoder, at any size (Rombach et al. 2022, section 3.1)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Positive
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.errors import UserError
from jaxdiff.models.attention import attend
from jaxdiff.models.autoencoders.base import AutoencoderSpec
from jaxdiff.models.autoencoders.tiling import VaeMode, apply_vae_mode, tile_sides
from jaxdiff.models.convolutions import Conv, GroupNorm, ResidualBlock, conv, fan_in_linear
from jaxdiff.models.flops import attention_flops, conv_flops, linear_flops, residual_block_flops
from jaxdiff.models.layers import Remat, patchify, unpatchify

NORM_EPSILON = 1e-6

LOGVAR_RANGE = (-30.0, 20.0)  # keeps exp() finite in float32


@checked
@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(AutoencoderSpec):
    """Size and shape of an autoencoder, under diffusers' names; the defaults are those of SD 1.x.

    Attributes:
      image_channels: channels of the images, in and out.
      latent_channels: channels of the latents.
      block_out_channels: one width for each resolution, finest first; each next halves the sides.
      layers_per_block: residual blocks at each resolution of the encoder; the decoder has one more.
      patch_size: side of the square of pixels that becomes one position of the finest resolution;
        1 in Stable Diffusion. Larger patches avoid convolutions at full resolution.
      norm_num_groups: number of groups of the group norms; divides every width.
      mid_block_add_attention: self-attention at the coarsest resolution.
      use_quant_conv: a 1x1 convolution after the encoder.
      use_post_quant_conv: a 1x1 convolution before the decoder.
      scaling_factor: factor to unit variance: `latents = (z - shift_factor) * scaling_factor`.
      shift_factor: the mean of z.
      sample_size: side of a tile in pixels, for vae_mode "tiling".
      remat: what a residual block keeps for the backward pass.
    """

    image_channels: Count = 3
    latent_channels: Count = 4
    block_out_channels: tuple[Count, ...] = (128, 256, 512, 512)
    layers_per_block: Count = 2
    patch_size: Count = 1
    norm_num_groups: Count = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: Positive = 0.18215
    shift_factor: float = 0.0
    sample_size: Count = 512
    remat: Remat = "none"

    def __post_init__(self):
        odd = [width for width in self.block_out_channels if width % self.norm_num_groups]
        if odd:
            raise UserError(
                f"autoencoder: {self.norm_num_groups} norm groups do not divide the width "
                f"{odd[0]}: expected block_out_channels that are multiples of norm_num_groups."
            )

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along each side."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)

    def build(self, *, rngs: nnx.Rngs) -> "Autoencoder":
        """Initialise the network."""
        return Autoencoder(self, rngs=rngs)

    def fingerprinted(self, params: Any) -> Any:
        """Return the encoder's parameters."""
        return {k: v for k, v in params.items() if k not in ("decoder", "post_quant_conv")}

    @property
    def patch_channels(self) -> int:
        """Values in one patch of pixels."""
        return self.patch_size**2 * self.image_channels

    def encode_flops(self, *, height: int, width: int) -> float:
        """FLOPs of encoding one image of this size, in pixels, to the moments of z."""
        widths, moments = self.block_out_channels, 2 * self.latent_channels
        area = height * width // self.patch_size**2
        total = conv_flops(3, self.patch_channels, widths[0], area)
        for i, outputs in enumerate(widths):
            total += residual_block_flops(widths[max(i - 1, 0)], outputs, area)
            total += (self.layers_per_block - 1) * residual_block_flops(outputs, outputs, area)
            if i + 1 < len(widths):
                area //= 4
                total += conv_flops(3, outputs, outputs, area)
        total += self._middle_flops(area) + conv_flops(3, widths[-1], moments, area)
        return total + (conv_flops(1, moments, moments, area) if self.use_quant_conv else 0.0)

    def decode_flops(self, *, height: int, width: int) -> float:
        """FLOPs of decoding z to one image of this size, in pixels."""
        widths, z = self.block_out_channels[::-1], self.latent_channels
        area = height * width // self.downsampling**2
        total = conv_flops(1, z, z, area) if self.use_post_quant_conv else 0.0
        total += conv_flops(3, z, widths[0], area) + self._middle_flops(area)
        for i, outputs in enumerate(widths):
            total += residual_block_flops(widths[max(i - 1, 0)], outputs, area)
            total += self.layers_per_block * residual_block_flops(outputs, outputs, area)
            if i + 1 < len(widths):
                area *= 4
                total += conv_flops(3, outputs, outputs, area)
        return total + conv_flops(3, widths[-1], self.patch_channels, area)

    def _middle_flops(self, area: int) -> float:
        width = self.block_out_channels[-1]
        total = 2 * residual_block_flops(width, width, area)
        if self.mid_block_add_attention:
            total += linear_flops(area, width, 4 * width) + attention_flops(area, area, width)
        return total


class Gaussian(NamedTuple):
    """A diagonal normal distribution over z, float32."""

    mean: Float[Array, "*b h w c"]
    logvar: Float[Array, "*b h w c"]

    def sample(self, keys: RowKeys) -> Float[Array, "b h w c"]:
        """Sample z of each image from its key."""
        noise = keys.normal(*self.mean.shape[1:])
        return self.mean + jnp.exp(self.logvar / 2) * noise

    def mode(self) -> Float[Array, "*b h w c"]:
        """Return the most likely z."""
        return self.mean

    def kl(self) -> Float[Array, "*b"]:
        """Return the KL divergence from N(0, 1) in nats (Kingma & Welling 2014, appendix B)."""
        nats = (self.mean**2 + jnp.exp(self.logvar) - 1 - self.logvar) / 2
        return jnp.sum(nats, axis=(-3, -2, -1))


def _downsample(channels: int, rngs: nnx.Rngs):
    # The published weights pad only the far sides.
    return Conv(channels, channels, 3, 2, rngs, sides=((0, 1), (0, 1)))


def _group_norm(channels: int, config: AutoencoderConfig, rngs: nnx.Rngs):
    return GroupNorm(channels, config.norm_num_groups, NORM_EPSILON, rngs)


def _block(inputs: int, outputs: int, config: AutoencoderConfig, rngs: nnx.Rngs):
    return ResidualBlock(
        inputs,
        outputs,
        groups=config.norm_num_groups,
        epsilon=NORM_EPSILON,
        remat=config.remat,
        rngs=rngs,
    )


class SpatialAttention(nnx.Module):
    """Self-attention of one head over all positions."""

    def __init__(self, channels: int, config: AutoencoderConfig, rngs: nnx.Rngs):
        self.norm = _group_norm(channels, config, rngs)
        self.q = fan_in_linear(channels, channels, rngs)
        self.k = fan_in_linear(channels, channels, rngs)
        self.v = fan_in_linear(channels, channels, rngs)
        self.out = fan_in_linear(channels, channels, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Add the output of attention."""
        b, h, w, c = x.shape
        y = self.norm(x).reshape(b, h * w, 1, c)
        y = attend(self.q(y), self.k(y), self.v(y))
        return x + self.out(y.reshape(b, h, w, c))


class KlMiddle(nnx.Module):
    """Residual block, attention, residual block, at the coarsest resolution."""

    def __init__(self, channels: int, config: AutoencoderConfig, rngs: nnx.Rngs):
        self.first = _block(channels, channels, config, rngs)
        attends = config.mid_block_add_attention
        self.attention = SpatialAttention(channels, config, rngs) if attends else None
        self.second = _block(channels, channels, config, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return the same shape."""
        x = self.first(x)
        if self.attention is not None:
            x = self.attention(x)
        return self.second(x)


class KlLevel(nnx.Module):
    """The residual blocks of one resolution, and its resampling convolution, if any."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        depth: int,
        resample: Conv | None,
        config: AutoencoderConfig,
        rngs: nnx.Rngs,
    ):
        self.blocks = nnx.List(
            _block(outputs if i else inputs, outputs, config, rngs) for i in range(depth)
        )
        self.resample = resample

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w e"]:
        """Run the residual blocks; the caller resamples."""
        for block in self.blocks:
            x = block(x)
        return x


class Encoder(nnx.Module):
    """Images to the moments of z: mean and logvar, concatenated by channel."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.patch_size = config.patch_size
        self.conv_in = conv(config.patch_channels, widths[0], 3, rngs)
        self.levels = nnx.List()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            down = _downsample(width, rngs) if i + 1 < len(widths) else None
            self.levels.append(KlLevel(before, width, config.layers_per_block, down, config, rngs))
        self.middle = KlMiddle(widths[-1], config, rngs)
        self.norm_out = _group_norm(widths[-1], config, rngs)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, 3, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Map images to `2 * latent_channels` channels."""
        b, h, w, _ = x.shape
        patches = patchify(x, self.patch_size)
        x = self.conv_in(patches.reshape(b, h // self.patch_size, w // self.patch_size, -1))
        for level in self.levels:
            x = level(x)
            if level.resample is not None:
                x = level.resample(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """From z to images."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        self.conv_in = conv(config.latent_channels, widths[0], 3, rngs)
        self.middle = KlMiddle(widths[0], config, rngs)
        self.levels = nnx.List()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            up = None if i + 1 == len(widths) else conv(width, width, 3, rngs)
            self.levels.append(
                KlLevel(before, width, config.layers_per_block + 1, up, config, rngs)
            )
        self.norm_out = _group_norm(widths[-1], config, rngs)
        self.patch_size = config.patch_size
        self.conv_out = conv(widths[-1], config.patch_channels, 3, rngs)

    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Map z to images."""
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
            if level.resample is not None:
                x = level.resample(x.repeat(2, axis=1).repeat(2, axis=2))
        patches = self.conv_out(jax.nn.silu(self.norm_out(x)))
        b, rows, columns, channels = patches.shape
        patches = patches.reshape(b, rows * columns, channels)
        return unpatchify(patches, rows, columns, self.patch_size)


class Autoencoder(nnx.Module):
    """Images in [-1, 1] to a distribution over z and back; computes in the dtype of its weights.

    `encode` returns z and `decode` takes it. `to_latents` shifts and scales z to the denoiser's
    latents of unit variance.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        *,
        rngs: nnx.Rngs,
        decoder: AutoencoderConfig | None = None,
    ):
        """`decoder` is the config of the decoder, where it differs."""
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(decoder or config, rngs)
        self.quant_conv = conv(2 * z, 2 * z, 1, rngs) if config.use_quant_conv else None
        self.post_quant_conv = conv(z, z, 1, rngs) if config.use_post_quant_conv else None

    def encode(self, images: Float[Array, "b h w c"], vae_mode: VaeMode = "full") -> Gaussian:
        """Return the distribution of z, of sides `h / downsampling` and `w / downsampling`.

        Args:
          images: in [-1, 1].
          vae_mode: how much is encoded at a time; "tiling" changes z slightly.

        Raises:
          UserError: the sides are no multiples of `config.downsampling`.
        """
        side = self.config.downsampling
        self._check_sides(images, side)
        tile_out, tile = tile_sides(self.config.sample_size, side)
        x = images.astype(self.encoder.conv_in.kernel.dtype)
        moments = apply_vae_mode(self._moments, x, vae_mode, tile, tile_out)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Gaussian(mean, jnp.clip(logvar, *LOGVAR_RANGE))

    def _check_sides(self, images: Float[Array, "b h w c"], side: int) -> None:
        h, w = images.shape[1:3]
        if h % side or w % side:
            raise UserError(
                f"autoencoder: images of {w}x{h} cannot be encoded: expected sides that are "
                f"multiples of {side}; crop or resize them."
            )

    def _moments(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        moments = self.encoder(images)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(
        self, z: Float[Array, "b h w c"], vae_mode: VaeMode = "full"
    ) -> Float[Array, "b h2 w2 c2"]:
        """Return images, float32, about in [-1, 1], not clipped.

        Args:
          z: of the images.
          vae_mode: how much is decoded at a time; "tiling" changes images slightly.
        """
        tile, tile_out = tile_sides(self.config.sample_size, self.config.downsampling)
        z = z.astype(self.decoder.conv_in.kernel.dtype)
        return apply_vae_mode(self._images, z, vae_mode, tile, tile_out).astype(jnp.float32)

    def _images(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def to_latents(self, z: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
        """Shift and scale z to latents of unit variance."""
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def from_latents(self, latents: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
        """Invert `to_latents`."""
        return latents / self.config.scaling_factor + self.config.shift_factor
