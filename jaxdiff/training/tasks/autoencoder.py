"""Train an autoencoder: reconstruction, KL divergence and perceptual distance."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Fraction, NotNegative, Positive
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.layers import abstract_params, bind_init, bind_params, init_params, param_axes
from jaxdiff.models.text_encoders.clip import ClipVision, ClipVisionConfig
from jaxdiff.models.text_to_image import from_uint8
from jaxdiff.training.tasks.base import Batch, Metrics, Path, PretrainedPart, Task

ENCODING = ("encoder", "quant_conv")  # the parts that decide on the latents
LEAST_MSE = 1e-10  # keeps the PSNR of a perfect image finite: 106 dB


@checked
@dataclass(frozen=True, kw_only=True)
class Perceptual:
    """Perceptual distance of two images in the features of a trained CLIP.

    The form is that of LPIPS without learned weights (Zhang et al. 2018, eq. 1): features of
    every layer, each of unit length.

    Attributes:
      model: the vision encoder.
      pretrained: folder of the CLIP that holds it.
      weight: weight of the distance in the loss.
    """

    model: ClipVisionConfig
    pretrained: str
    weight: Positive = 0.1

    def distance(
        self, encoder: ClipVision, images: Float[Array, "b h w 3"], others: Float[Array, "b i j 3"]
    ) -> Float[Array, ""]:
        """Return the mean squared distance of unit vectors over images, tokens, layers, in [0, 4].

        Images in [-1, 1] are resized to the encoder's size.
        """
        a, b = (encoder.hidden_states(self._fit(x)) for x in (images, others))
        return jnp.mean(jnp.sum((_unit(a) - _unit(b)) ** 2, axis=-1))

    def _fit(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b s s 3"]:
        b, h, w, c = images.shape
        side = self.model.image_size
        if h == w == side:
            return images
        return jax.image.resize(images, (b, side, side, c), "cubic")  # antialiased if it shrinks


@checked
@dataclass(frozen=True, kw_only=True)
class AutoencoderTask(Task):
    """Reconstruct images through a low-dimensional latent space (Rombach et al. 2022, section 3.1).

        loss = (1 - l2_fraction) L1 + l2_fraction L2 + kl_weight KL + perceptual.weight D

    L1 and L2 are means over the values of an image in [-1, 1]. KL is the divergence of z from the
    unit normal in nats, per value of the image, so that `kl_weight` corresponds to Stable
    Diffusion's at any image size, where all terms are sums.

    A small weight does not fix the scale of z, and denoisers need latents of mean 0 and standard
    deviation 1: read `z_mean` and `z_std` from the last lines of the run's metrics, and set in the
    recipe that trains on these latents

        shift_factor = z_mean,  scaling_factor = 1 / z_std.

    With `latent_noise` tau, the decoder reads z + n / scaling_factor with n ~ N(0, s^2), and
    s ~ |N(0, tau^2)| for each image: it learns to correct the errors of a denoiser (Zheng et al.
    2025, arXiv 2510.11690, "noise-augmented decoding").

    Attributes:
      model: the autoencoder.
      kl_weight: weight of the divergence.
      l2_fraction: fraction of squared error in the reconstruction; 0 is absolute error alone.
      perceptual: perceptual distance of image and reconstruction.
      pretrained: folder of an autoencoder of the same size that training starts from.
      latent_noise: tau, in standard deviations of the denoiser's latents.
      decoder_only: keep the latents, and with them all denoisers; train the decoder alone.
    """

    model: AutoencoderConfig
    kl_weight: NotNegative = 1e-6
    l2_fraction: Fraction = 0.0
    perceptual: Perceptual | None = None
    pretrained: str | None = None
    latent_noise: NotNegative = 0.0
    decoder_only: bool = False

    def __post_init__(self):
        if self.decoder_only and self.pretrained is None:
            raise UserError(
                "task.decoder_only is True without task.pretrained: expected the autoencoder whose "
                "latents the decoder is for; give its folder."
            )
        if self.model.image_channels != 3:
            raise UserError(
                f"The autoencoder takes images of {self.model.image_channels} channels but those "
                "it is trained on have 3; set model.image_channels to 3."
            )

    def init_params(self, rngs: nnx.Rngs) -> dict[str, Any]:
        """Initialise the autoencoder, or its decoder."""
        params = init_params(lambda rngs: self.model.build(rngs=rngs), rngs)
        return {name: part for name, part in params.items() if name not in self._frozen}

    @property
    def _frozen(self) -> tuple[str, ...]:
        return ENCODING if self.decoder_only else ()

    def param_axes(self) -> dict[str, Any]:
        """Return the axes of the autoencoder's parameters, and of the vision encoder's."""
        axes = param_axes(bind_init(type(self.model).build, self.model))
        if self.perceptual is not None:
            axes["vision"] = param_axes(bind_init(ClipVision, self.perceptual.model))
        return axes

    def frozen_parts(self) -> dict[Path, PretrainedPart]:
        """Return the encoder unless it is trained, and the perceptual term's vision encoder."""
        parts = {path: part for path, part in self._parts().items() if path[0] in self._frozen}
        if self.perceptual is not None:
            build = bind_init(ClipVision, self.perceptual.model)
            parts["vision",] = PretrainedPart(self.perceptual.pretrained, build)
        return parts

    def initial_parts(self) -> dict[Path, PretrainedPart]:
        """Return the autoencoder if it starts from a trained one's weights."""
        if self.pretrained is None:
            return {}
        return {path: part for path, part in self._parts().items() if path[0] not in self._frozen}

    def model_params(self, params: PyTree, frozen: PyTree) -> dict[str, Any]:
        """Return encoder and decoder."""
        return {**params, **{name: frozen[name] for name in self._frozen}}

    def _parts(self) -> dict[Path, PretrainedPart]:
        """Return the parts of the trained autoencoder."""
        build = bind_init(type(self.model).build, self.model)
        return {
            (name,): PretrainedPart(
                self.pretrained, bind_init(_part, self.model, name), source=("autoencoder", name)
            )
            for name in abstract_params(build)
        }

    def loss(
        self,
        params: PyTree,
        frozen: PyTree,
        batch: Batch,
        keys: RowKeys,
        task_state: tuple[()],
        ema: PyTree,
    ) -> tuple[Float[Array, ""], Metrics, tuple[()]]:
        """Return the loss and its terms, unweighted, the PSNR in dB, and the moments of z."""
        build = bind_init(type(self.model).build, self.model)
        model = bind_params(build, self.model_params(params, frozen))
        images = from_uint8(batch["image"])
        gaussian = model.encode(images)
        z_keys, noise_keys = keys.split() if self.latent_noise else (keys, None)
        z = gaussian.sample(z_keys)
        decoded = model.decode(z if noise_keys is None else self._noisy(z, noise_keys))
        error = decoded - images
        l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
        reconstruction = (1 - self.l2_fraction) * l1 + self.l2_fraction * l2
        kl = jnp.mean(gaussian.kl()) / images[0].size
        loss = reconstruction + self.kl_weight * kl
        metrics = {
            "reconstruction": reconstruction,
            "kl": kl,
            "psnr": psnr(decoded, images),
            "z_mean": jnp.mean(z),
            "z_std": jnp.std(z),
        }
        if self.perceptual is not None:
            encoder = bind_params(bind_init(ClipVision, self.perceptual.model), frozen["vision"])
            metrics["perceptual"] = self.perceptual.distance(encoder, decoded, images)
            loss += self.perceptual.weight * metrics["perceptual"]
        return loss, {"loss": loss, **metrics}, task_state

    def _noisy(self, z: Float[Array, "b h w c"], keys: RowKeys) -> Float[Array, "b h w c"]:
        """Add noise of a random standard deviation to each image's latents."""
        deviation_keys, noise_keys = keys.split()
        deviation = self.latent_noise / self.model.scaling_factor
        sigma = deviation * jnp.abs(deviation_keys.normal(1, 1, 1))
        return z + sigma * noise_keys.normal(*z.shape[1:])

    def flops_per_image(self, size: int, *, latents: bool = False, text: bool = False) -> float:
        """Return the FLOPs of encoder, decoder and perceptual term, forward and backward."""
        sides = {"height": size, "width": size}
        total = self.model.encode_flops(**sides) + self.model.decode_flops(**sides)
        # Forward for the image, forward and backward for the reconstruction.
        perceptual = 3 * self.perceptual.model.flops() if self.perceptual else 0.0
        return 3 * total + perceptual


def _part(config: AutoencoderConfig, name: str, *, rngs: nnx.Rngs) -> nnx.Module:
    return getattr(config.build(rngs=rngs), name)


def psnr(decoded: Float[Array, "b h w c"], images: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Return the mean peak signal-to-noise ratio in dB of images clipped to [-1, 1]."""
    mse = jnp.mean((jnp.clip(decoded, -1, 1) - images) ** 2, axis=(1, 2, 3))
    return jnp.mean(10 * jnp.log10(4 / jnp.maximum(mse, LEAST_MSE)))


def _unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
