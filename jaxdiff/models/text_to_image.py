"""The model specification: a text-to-image model without its weights.

Parameters are one tree:

    denoiser                     the denoising network
    text_encoders.NAME           by the conditioner's names
    autoencoder                  where the model works on latents
    adapters.denoiser            low-rank adapters, at the paths of their layers, scale included
    adapters.text_encoders.NAME
    added_tokens.NAME            [k, width]: embeddings of the ids that follow the vocabulary
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array, Float, UInt8

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count
from jaxdiff.diffusion.process import Prediction
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.diffusion.schedules import AnySchedule
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.base import AutoencoderSpec
from jaxdiff.models.autoencoders.flux2 import Flux2AutoencoderConfig
from jaxdiff.models.autoencoders.kl import AutoencoderConfig, Gaussian
from jaxdiff.models.autoencoders.tiling import VaeMode
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.conditioners.flux1 import Flux1Conditioner
from jaxdiff.models.conditioners.flux2 import Flux2Conditioner
from jaxdiff.models.conditioners.z_image import ZImageConditioner
from jaxdiff.models.conditioning import (
    ClipConditioner,
    Conditioner,
    Conditioning,
    StableDiffusionXLConditioner,
    TextInputs,
)
from jaxdiff.models.convolutions import Conv, Wrap, wrap_convolutions
from jaxdiff.models.denoisers.base import Denoiser
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.denoisers.flux import FluxConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.denoisers.unet_small import UNetConfig
from jaxdiff.models.denoisers.z_image import ZImageConfig
from jaxdiff.models.layers import (
    Dense,
    abstract_module,
    abstract_params,
    bind_build,
    bind_params,
    init_params,
    param_axes,
)
from jaxdiff.models.lora import adapter_axes, add_adapters
from jaxdiff.models.quantized import QuantizedType, quantize_kernel
from jaxdiff.sampling.sampler import Sampler

AnyDenoiser = DiTConfig | UNetConfig | UNet2DConditionConfig | FluxConfig | ZImageConfig | Denoiser
AnyConditioner = (
    ClipConditioner
    | StableDiffusionXLConditioner
    | Flux1Conditioner
    | Flux2Conditioner
    | ZImageConditioner
    | Conditioner
)
AnyAutoencoder = (
    AutoencoderConfig | TinyAutoencoderConfig | Flux2AutoencoderConfig | AutoencoderSpec
)

Params = Mapping[str, Any]
Images = Float[Array, "b h w 3"]  # in [-1, 1]
Latents = Float[Array, "b i j c"]  # the denoiser's space, which may be pixels
Network = Callable[[Latents, Float[Array, " b"], Conditioning], Latents]

NO_WRAP: Wrap = (False, False)


class Part(NamedTuple):
    """A component of a model: its path in the tree of parameters, and its module."""

    path: tuple[str, ...]
    build: Callable[[], nnx.Module]


@checked
@dataclass(frozen=True, kw_only=True)
class TextToImage:
    """A text-to-image model without its weights.

    Attributes:
      name: name of the model, for messages and file names.
      denoiser: the network.
      conditioner: text encoders, which return a `Conditioning`.
      autoencoder: between pixels and latents; None for models on pixels.
      prediction: type of the network's prediction.
      schedule: schedule of the noise.
      image_size: side of the training images, in pixels.
      sampler: default sampler settings.

    Raises:
      UserError: widths or channels of the parts differ.
    """

    name: str = "model"
    denoiser: AnyDenoiser
    conditioner: AnyConditioner
    autoencoder: AnyAutoencoder | None = None
    prediction: Prediction
    schedule: AnySchedule
    image_size: Count
    sampler: Sampler = field(default_factory=Sampler)

    def __post_init__(self):
        text, reads = self.conditioner, self.denoiser
        widths = (reads.text_width, text.text_width), (reads.pooled_width, text.pooled_width)
        if any(want is not None and want != have for want, have in widths):
            pooled = "" if reads.pooled_width is None else f" and {reads.pooled_width} (pooled)"
            raise UserError(
                f"The denoiser expects text of widths {reads.text_width}{pooled} but the text "
                f"encoder gives {text.text_width} and {text.pooled_width}: set "
                "denoiser.text_width and denoiser.pooled_width to those."
            )
        channels = self.autoencoder.latent_channels if self.autoencoder else 3
        if channels != reads.channels:
            raise UserError(
                f"The denoiser has {reads.channels} channels but its inputs have {channels}: set "
                f"denoiser.channels to {channels}."
            )

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each side; 1 for models on pixels."""
        return self.autoencoder.downsampling if self.autoencoder else 1

    @property
    def size_multiple(self) -> int:
        """Sides of images must be multiples of this, in pixels."""
        return self.downsampling * self.denoiser.size_multiple

    @property
    def is_inpainting(self) -> bool:
        """Whether the network reads a mask and masked latents."""
        return self.denoiser.extra_channels > 0

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return height, width and channels of latents for images of a size in pixels."""
        return height // self.downsampling, width // self.downsampling, self.denoiser.channels

    @property
    def parts(self) -> tuple[Part, ...]:
        """The components, the denoiser first."""
        parts = [Part(("denoiser",), bind_build(self.denoiser))]
        for name, encoder in self.conditioner.encoders.items():
            parts.append(Part(("text_encoders", name), bind_build(encoder)))
        if self.autoencoder is not None:
            parts.append(Part(("autoencoder",), bind_build(self.autoencoder)))
        return tuple(parts)

    def abstract_params(self) -> dict[str, Any]:
        """Return shapes and types of the parameters, without adapters and added tokens."""
        return tree_of({part.path: abstract_params(part.build) for part in self.parts})

    def param_axes(self) -> dict[str, Any]:
        """Return the names of the axes of all parameters, adapters and added tokens included.

        `jaxdiff.distributed.sharding` maps them to mesh axes.
        """
        axes: dict[tuple[str, ...], Any] = {p.path: param_axes(p.build) for p in self.parts}
        for part in self.parts:
            if part.path[0] != "autoencoder":
                axes["adapters", *part.path] = adapter_axes(abstract_module(part.build))
        for name in self.conditioner.encoders:
            axes["added_tokens", name] = ("vocab", "embed")
        return tree_of(axes)

    def init_denoiser(self, rngs: nnx.Rngs) -> dict[str, Any]:
        """Initialise the denoiser's parameters."""
        return init_params(lambda rngs: self.denoiser.build(rngs=rngs), rngs)

    def init_text_encoders(self, rngs: nnx.Rngs) -> dict[str, Any]:
        """Initialise the text encoders' parameters, by name."""
        return {
            name: init_params(lambda rngs, e=encoder: e.build(rngs=rngs), rngs)
            for name, encoder in self.conditioner.encoders.items()
        }

    def quantize(self, params: Params, kind: QuantizedType) -> dict[str, Any]:
        """Return parameters with the kernels of all Dense and Conv layers quantised, on the host.

        Embeddings, norms, biases and adapters keep their type; quantised kernels stay as they are.
        """
        flat: dict[Any, Any] = traverse_util.flatten_dict(dict(params))
        for path, axes in self.kernel_axes().items():
            flat[path] = quantize_kernel(flat[path], axes, kind)
        return traverse_util.unflatten_dict(flat)

    def kernel_axes(self) -> dict[tuple[Any, ...], int]:
        """Return the paths of the kernels of all Dense and Conv layers, and one layer's axes."""
        return {
            (*part.path, *path, "kernel"): 4 if isinstance(layer, Conv) else 2
            for part in self.parts
            for path, layer in nnx.iter_modules(abstract_module(part.build))
            if isinstance(layer, Dense | Conv)
        }

    @jax.named_scope("text_encoder")
    def encode_text(self, params: Params, inputs: TextInputs) -> Conditioning:
        """Encode tokenized prompts."""
        return self.conditioner.encode(params, inputs)

    def network(self, params: Params, wrap: Wrap = NO_WRAP) -> Network:
        """Return the denoiser with its parameters, called as (x_t, t, cond).

        Args:
          params: of the model.
          wrap: whether padding is circular, vertically and horizontally.
        """
        network = bind_params(bind_build(self.denoiser), params["denoiser"])
        adapters = params.get("adapters", {}).get("denoiser")
        if adapters is not None:
            add_adapters(network, adapters)
        wrap_convolutions(network, wrap)
        return network  # type: ignore[return-value]

    def predict(
        self, params: Params, x_t: Latents, t: Float[Array, " b"], cond: Conditioning
    ) -> Latents:
        """Evaluate the denoiser: `prediction` for x_t at times t in [0, 1]."""
        return self.network(params)(x_t, t, cond)

    @jax.named_scope("autoencoder")
    def encode(
        self,
        params: Params,
        images: Images,
        keys: RowKeys | None = None,
        *,
        vae_mode: VaeMode = "full",
        wrap: Wrap = NO_WRAP,
    ) -> Latents:
        """Encode images in [-1, 1] to latents; without keys, to the mode."""
        if self.autoencoder is None:
            return images
        autoencoder = self._autoencoder(params, wrap)
        z = autoencoder.encode(images, vae_mode)
        return autoencoder.to_latents(z.mode() if keys is None else z.sample(keys))

    @jax.named_scope("autoencoder")
    def decode(
        self,
        params: Params,
        latents: Latents,
        *,
        vae_mode: VaeMode = "full",
        wrap: Wrap = NO_WRAP,
    ) -> Images:
        """Decode latents to images, about in [-1, 1]."""
        if self.autoencoder is None:
            return latents
        autoencoder = self._autoencoder(params, wrap)
        return autoencoder.decode(autoencoder.from_latents(latents), vae_mode)

    def latents_from_moments(
        self, params: Params, moments: Float[Array, "b i j m"], keys: RowKeys | None = None
    ) -> Latents:
        """Sample latents from cached moments of z: means, then any logarithms of variances.

        Without keys, return the mode.
        """
        assert self.autoencoder is not None
        z = moments.astype(jnp.float32)
        if self.autoencoder.moment_channels > self.autoencoder.latent_channels:
            gaussian = Gaussian(*jnp.split(z, 2, axis=-1))
            z = gaussian.mode() if keys is None else gaussian.sample(keys)
        return self._autoencoder(params, NO_WRAP).to_latents(z)

    def _autoencoder(self, params: Params, wrap: Wrap) -> Any:
        assert self.autoencoder is not None
        autoencoder = bind_params(bind_build(self.autoencoder), params["autoencoder"])
        wrap_convolutions(autoencoder, wrap)
        return autoencoder


def from_uint8(images: UInt8[Array, "b h w 3"]) -> Images:
    """Scale pixels 0..255 to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def tree_of(parts: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Return a nested dict of parts, given by their paths."""
    return traverse_util.unflatten_dict(parts)


def merge_params(*trees: Params) -> dict[str, Any]:
    """Merge trees of parameters that have no part in common."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for name, value in tree.items():
            if name in ("text_encoders", "adapters", "added_tokens") and name in merged:
                merged[name] = {**merged[name], **value}
            else:
                merged[name] = value
    return merged
