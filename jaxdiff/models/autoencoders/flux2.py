"""FLUX.2's KL autoencoder: squares of z become one latent, normalised by stored statistics.

    latent = (packed(mean of z) - running_mean) / sqrt(running_var + epsilon)

A latent of 128 channels stands for 2x2 positions of z, of 32 channels. The network is Stable
Diffusion's (`kl`).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Positive
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.base import AutoencoderSpec
from jaxdiff.models.autoencoders.kl import Autoencoder, AutoencoderConfig, Gaussian
from jaxdiff.models.autoencoders.tiling import VaeMode
from jaxdiff.models.layers import Remat, patchify, unpatchify

PACK = 2
"""Side of the square of positions of z that becomes one latent."""


@checked
@dataclass(frozen=True, kw_only=True)
class Flux2AutoencoderConfig(AutoencoderSpec):
    """Size and shape, under diffusers' names; the defaults are those of FLUX.2.

    Attributes:
      image_channels: channels of the images, in and out.
      z_channels: channels of z, a fourth of the latents'.
      block_out_channels: one width for each resolution, finest first; each next halves the sides.
      decoder_block_out_channels: the decoder's, if they differ.
      layers_per_block: residual blocks at each resolution of the encoder; the decoder has one more.
      norm_num_groups: number of groups of the group norms; divides every width.
      mid_block_add_attention: self-attention at the coarsest resolution.
      use_quant_conv: a 1x1 convolution after the encoder.
      use_post_quant_conv: a 1x1 convolution before the decoder.
      batch_norm_eps: added to the variance of the latents.
      sample_size: side of a tile in pixels, for vae_mode "tiling".
      remat: what a residual block keeps for the backward pass.
    """

    image_channels: Count = 3
    z_channels: Count = 32
    block_out_channels: tuple[Count, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[Count, ...] | None = None
    layers_per_block: Count = 2
    norm_num_groups: Count = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    batch_norm_eps: Positive = 1e-4
    sample_size: Count = 1024
    remat: Remat = "none"

    def __post_init__(self):
        widths = self.decoder.block_out_channels
        if len(widths) != len(self.encoder.block_out_channels):
            raise UserError(
                f"autoencoder: decoder_block_out_channels is {widths}: expected "
                f"{len(self.block_out_channels)} widths, one for each of block_out_channels."
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.z_channels * PACK**2

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along each side."""
        return PACK * self.encoder.downsampling

    @property
    def encoder(self) -> AutoencoderConfig:
        """The autoencoder whose encoder this one has."""
        return AutoencoderConfig(
            image_channels=self.image_channels,
            latent_channels=self.z_channels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            norm_num_groups=self.norm_num_groups,
            mid_block_add_attention=self.mid_block_add_attention,
            use_quant_conv=self.use_quant_conv,
            use_post_quant_conv=self.use_post_quant_conv,
            sample_size=self.sample_size,
            remat=self.remat,
        )

    @property
    def decoder(self) -> AutoencoderConfig:
        """The autoencoder whose decoder this one has."""
        widths = self.decoder_block_out_channels or self.block_out_channels
        return dataclasses.replace(self.encoder, block_out_channels=widths)

    @property
    def moment_channels(self) -> int:
        """Channels of z's moments: z has no variance."""
        return self.latent_channels

    def build(self, *, rngs: nnx.Rngs) -> "Flux2Autoencoder":
        """Initialise the network."""
        return Flux2Autoencoder(self, rngs=rngs)

    def fingerprinted(self, params: Any) -> Any:
        """Return the encoder's parameters and the statistics."""
        return self.encoder.fingerprinted(params)

    def encode_flops(self, *, height: int, width: int) -> float:
        """FLOPs of encoding one image of this size, in pixels."""
        return self.encoder.encode_flops(height=height, width=width)

    def decode_flops(self, *, height: int, width: int) -> float:
        """FLOPs of decoding one image of this size, in pixels."""
        return self.decoder.decode_flops(height=height, width=width)


class LatentStatistics(nnx.Module):
    """Mean and variance of each channel of packed z over the training data; constants here."""

    def __init__(self, channels: int):
        self.running_mean = nnx.Param(jnp.zeros(channels))
        self.running_var = nnx.Param(jnp.ones(channels))
        self.num_batches_tracked = nnx.Param(jnp.zeros((), jnp.int32))  # kept for export


class Flux2Autoencoder(Autoencoder):
    """Images in [-1, 1] to packed z and back; `to_latents` normalises it."""

    def __init__(self, config: Flux2AutoencoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config.encoder, rngs=rngs, decoder=config.decoder)
        self.bn = LatentStatistics(config.latent_channels)
        self.epsilon = config.batch_norm_eps

    def encode(self, images: Float[Array, "b h w c"], vae_mode: VaeMode = "full") -> Gaussian:
        """Return the mean of packed z, of sides `h / downsampling` and `w / downsampling`.

        Args:
          images: in [-1, 1].
          vae_mode: how much is encoded at a time; "tiling" changes z slightly.

        Returns:
          A distribution of variance 0: FLUX.2 is trained on the means.

        Raises:
          UserError: the sides are no multiples of the config's `downsampling`.
        """
        self._check_sides(images, PACK * self.config.downsampling)
        mean = pack_latents(super().encode(images, vae_mode).mean)
        return Gaussian(mean, jnp.full_like(mean, -jnp.inf))

    def decode(
        self, z: Float[Array, "b h w c"], vae_mode: VaeMode = "full"
    ) -> Float[Array, "b h2 w2 c2"]:
        """Return images, float32, about in [-1, 1], not clipped.

        Args:
          z: packed z of the images.
          vae_mode: how much is decoded at a time; "tiling" changes images slightly.
        """
        return super().decode(unpack_latents(z), vae_mode)

    def to_latents(self, z: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
        """Normalise packed z."""
        mean, deviation = self._statistics()
        return (z - mean) / deviation

    def from_latents(self, latents: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
        """Invert `to_latents`."""
        mean, deviation = self._statistics()
        return latents * deviation + mean

    def _statistics(self) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        mean, variance = self.bn.running_mean[...], self.bn.running_var[...]
        mean, variance = mean.astype(jnp.float32), variance.astype(jnp.float32)
        return mean, jnp.sqrt(variance + self.epsilon)


def pack_latents(z: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 4*c"]:
    """Join squares of positions by channel, in the order channel, row, column."""
    b, h, w, _ = z.shape
    return patchify(z, PACK, channels_first=True).reshape(b, h // PACK, w // PACK, -1)


def unpack_latents(z: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c/4"]:
    """Invert `pack_latents`."""
    b, h, w, c = z.shape
    return unpatchify(z.reshape(b, h * w, c), h, w, PACK, channels_first=True)
