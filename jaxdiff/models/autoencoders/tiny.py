"""The tiny autoencoder of the TAESD family, for previews and quick decoding.

Distilled from Stable Diffusion's (github.com/madebyollin/taesd): convolutions of one width and
ReLU, no norms, no attention. Its z are the denoiser's latents.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.base import AutoencoderSpec
from jaxdiff.models.autoencoders.kl import Gaussian
from jaxdiff.models.autoencoders.tiling import VaeMode, apply_vae_mode, tile_sides
from jaxdiff.models.convolutions import Conv
from jaxdiff.models.flops import conv_flops

BOUND = 3.0  # the decoder maps latents to (-BOUND, BOUND) by tanh first


@checked
@dataclass(frozen=True, kw_only=True)
class TinyAutoencoderConfig(AutoencoderSpec):
    """Size and shape; the defaults are those of TAESD.

    Attributes:
      image_channels: channels of the images, in and out.
      latent_channels: channels of the latents.
      width: width of every layer.
      encoder_blocks: residual blocks at each resolution, finest first; each next halves the sides.
      decoder_blocks: residual blocks at each resolution of the decoder, coarsest first.
      sample_size: side of a tile in pixels, for vae_mode "tiling".
    """

    image_channels: Count = 3
    latent_channels: Count = 4
    width: Count = 64
    encoder_blocks: tuple[Count, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[Count, ...] = (3, 3, 3, 1)
    sample_size: Count = 512

    def __post_init__(self):
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise UserError(
                f"tiny autoencoder: encoder_blocks {self.encoder_blocks} and decoder_blocks "
                f"{self.decoder_blocks} differ in length: expected one number per resolution."
            )

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.encoder_blocks) - 1)

    @property
    def moment_channels(self) -> int:
        """Channels of z's moments: z has no variance."""
        return self.latent_channels

    def build(self, *, rngs: nnx.Rngs) -> "TinyAutoencoder":
        """Initialise the network."""
        return TinyAutoencoder(self, rngs=rngs)

    def fingerprinted(self, params: Any) -> Any:
        """Return the encoder's parameters."""
        return params["encoder"]

    def encode_flops(self, *, height: int, width: int) -> float:
        """FLOPs of encoding one image of this size, in pixels."""
        channels, area, total = self.width, height * width, 0.0
        for i, count in enumerate(self.encoder_blocks):
            area = area // 4 if i else area
            total += conv_flops(3, channels if i else self.image_channels, channels, area)
            total += 3 * count * conv_flops(3, channels, channels, area)
        return total + conv_flops(3, channels, self.latent_channels, area)

    def decode_flops(self, *, height: int, width: int) -> float:
        """FLOPs of decoding one image of this size, in pixels."""
        channels, area = self.width, height * width // self.downsampling**2
        total = conv_flops(3, self.latent_channels, channels, area)
        for i, count in enumerate(self.decoder_blocks):
            area = area * 4 if i else area
            total += (3 * count + (i > 0)) * conv_flops(3, channels, channels, area)
        return total + conv_flops(3, channels, self.image_channels, area)


class Block(nnx.Module):
    """Three convolutions with a residual around them."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv1, self.conv2, self.conv3 = (Conv(width, width, 3, 1, rngs) for _ in range(3))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return the same shape."""
        y = self.conv2(jax.nn.relu(self.conv1(x)))
        return jax.nn.relu(self.conv3(jax.nn.relu(y)) + x)


class Relu(nnx.Module):
    """ReLU as a module: checkpoints count it in their list of layers."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Apply ReLU."""
        return jax.nn.relu(x)


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling by 2, a module for the same reason."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Double height and width."""
        return x.repeat(2, axis=1).repeat(2, axis=2)


class Layers(nnx.Module):
    """The encoder or the decoder: layers in sequence, in the type of their weights."""

    def __init__(self, first: Conv, *rest: nnx.Module):
        self.layers = nnx.List([first, *rest])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Apply all layers."""
        first = self.layers[0]
        assert isinstance(first, Conv)
        x = x.astype(first.kernel[...].dtype)
        for layer in self.layers:
            x = layer(x)
        return x


def _encoder(config: TinyAutoencoderConfig, rngs: nnx.Rngs) -> Layers:
    width, layers = config.width, list[nnx.Module]()
    first = Conv(config.image_channels, width, 3, 1, rngs)
    for i, count in enumerate(config.encoder_blocks):
        if i:
            layers.append(Conv(width, width, 3, 2, rngs, bias=False))
        layers += [Block(width, rngs) for _ in range(count)]
    return Layers(first, *layers, Conv(width, config.latent_channels, 3, 1, rngs))


def _decoder(config: TinyAutoencoderConfig, rngs: nnx.Rngs) -> Layers:
    width = config.width
    first, layers = Conv(config.latent_channels, width, 3, 1, rngs), list[nnx.Module]([Relu()])
    for i, count in enumerate(config.decoder_blocks):
        if i:
            layers += [Upsample(), Conv(width, width, 3, 1, rngs, bias=False)]
        layers += [Block(width, rngs) for _ in range(count)]
    return Layers(first, *layers, Conv(width, config.image_channels, 3, 1, rngs))


class TinyAutoencoder(nnx.Module):
    """Images in [-1, 1] to latents and back, with the methods of `Autoencoder`."""

    def __init__(self, config: TinyAutoencoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = _encoder(config, rngs)
        self.decoder = _decoder(config, rngs)

    def encode(self, images: Float[Array, "b h w c"], vae_mode: VaeMode = "full") -> Gaussian:
        """Return latents of images in [-1, 1], as a distribution of variance 0."""
        tile_out, tile = tile_sides(self.config.sample_size, self.config.downsampling)
        mean = apply_vae_mode(self.encoder, (images + 1) / 2, vae_mode, tile, tile_out)
        mean = mean.astype(jnp.float32)
        return Gaussian(mean, jnp.full_like(mean, -jnp.inf))

    def decode(
        self, z: Float[Array, "b h w c"], vae_mode: VaeMode = "full"
    ) -> Float[Array, "b h2 w2 c2"]:
        """Return images of latents, float32, about in [-1, 1]."""
        tile, tile_out = tile_sides(self.config.sample_size, self.config.downsampling)
        x = jnp.tanh(z / BOUND) * BOUND
        images = apply_vae_mode(self.decoder, x, vae_mode, tile, tile_out)
        return images.astype(jnp.float32) * 2 - 1

    def to_latents(self, z: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
        """Return z, which is of unit variance."""
        return z

    def from_latents(self, latents: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
        """Invert `to_latents`."""
        return latents
