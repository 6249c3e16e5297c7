"""Interface of autoencoder configs."""

import abc
import dataclasses
from typing import Any, ClassVar

from flax import nnx


class AutoencoderSpec(abc.ABC):
    """Config of an autoencoder; a network's own is a frozen dataclass that inherits it.

    The module that `build` makes has `encode(images, vae_mode) -> z` with `z.mode()`,
    `z.sample(keys)` and its moments `z.mean`, `z.logvar`; `decode(z, vae_mode) -> images`; and
    `to_latents(z)`, `from_latents(latents)` between z and the denoiser's latents of unit variance.
    Images are in [-1, 1], NHWC.

    Attributes:
      latent_channels: of the latents.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # of those that inherit it

    latent_channels: int

    @property
    @abc.abstractmethod
    def downsampling(self) -> int:
        """Pixels per latent, along each side."""

    @abc.abstractmethod
    def build(self, *, rngs: nnx.Rngs) -> Any:
        """Initialise the network."""

    @abc.abstractmethod
    def encode_flops(self, *, height: int, width: int) -> float:
        """FLOPs of encoding one image of height x width pixels."""

    @abc.abstractmethod
    def decode_flops(self, *, height: int, width: int) -> float:
        """FLOPs of decoding one image of height x width pixels."""

    @property
    def moment_channels(self) -> int:
        """Channels of z's moments: means, and logarithms of variances where there are any."""
        return 2 * self.latent_channels

    def fingerprinted(self, params: Any) -> Any:
        """Return the parameters that determine latents; by default all."""
        return params
