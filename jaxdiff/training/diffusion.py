"""Training a denoiser, with its text encoder, on pixels or on an autoencoder's latents."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdiff.diffusion.curriculum import NoiseCurriculum
from jaxdiff.diffusion.losses import Objective, loss_by_level
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from jaxdiff.models.clip import ClipText, ClipTextConfig
from jaxdiff.models.dit import DiT, DiTConfig
from jaxdiff.models.layers import TextFeatures, merge
from jaxdiff.models.unet import UNet, UNetConfig
from jaxdiff.training.task import Batch, Metrics, Pretrained, from_uint8


@dataclass(frozen=True, kw_only=True)
class TextTower:
    """The text encoder.

    Attributes:
      model: its size.
      pretrained: folder of the run or bundle, or `shipped:NAME`, whose text tower it starts as;
        None draws one. A tower that starts as drawn and learns along with the denoiser is in
        danger: before the denoiser heeds prompts they are noise to it, and the tower then learns
        to say the same of all of them.
      trained: whether it learns along with the denoiser or stays as it starts.
      layer: which hidden state becomes the words that the denoiser reads, counted as
        `ClipText.__call__` does; 0 is the words alone, None the last.
    """

    model: ClipTextConfig
    pretrained: str | None = None
    trained: bool = True
    layer: int | None = None


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The latent space of a trained autoencoder.

    Attributes:
      model: the autoencoder.
      pretrained: folder of the run or bundle that holds it, or `shipped:NAME`.
    """

    model: AutoencoderConfig
    pretrained: str


def _network(config: DiTConfig | UNetConfig, rngs: nnx.Rngs) -> DiT | UNet:
    return DiT(config, rngs=rngs) if isinstance(config, DiTConfig) else UNet(config, rngs=rngs)


class TextToImage(nnx.Module):
    """What is trained: the denoiser, and the text encoder unless that is a frozen one."""

    def __init__(
        self, denoiser: DiTConfig | UNetConfig, text: ClipTextConfig | None, *, rngs: nnx.Rngs
    ):
        if text is not None:
            self.text = ClipText(text, rngs=rngs)
        self.denoiser = _network(denoiser, rngs)


@dataclass(frozen=True, kw_only=True)
class DiffusionTask:
    """Prediction of the noise, or of x0, v or velocity, given a prompt.

    Attributes:
      denoiser: the network.
      pretrained: folder of the run or bundle, or `shipped:NAME`, whose denoiser it starts as; None
        draws one.
      text: the text encoder.
      latents: the space that is modelled; None for pixels.
      objective: what the network predicts, on which noise, and how errors count.
      curriculum: little noise first; None draws all levels from the start.
    """

    denoiser: DiTConfig | UNetConfig
    pretrained: str | None = None
    text: TextTower
    latents: Latents | None = None
    objective: Objective
    curriculum: NoiseCurriculum | None = None

    def __post_init__(self):
        text, denoiser = self.text.model, self.denoiser
        widths = (text.width, text.projection_dim or text.width)
        if widths != (denoiser.text_width, denoiser.pooled_width):
            raise UserError(
                f"The denoiser expects text of widths {denoiser.text_width} and "
                f"{denoiser.pooled_width} (pooled) but the text encoder gives {widths[0]} and "
                f"{widths[1]}; make denoiser.text_width and denoiser.pooled_width those."
            )
        channels = self.latents.model.latent_channels if self.latents else 3
        if channels != denoiser.channels:
            raise UserError(
                f"The denoiser works on {denoiser.channels} channels but the images it is given "
                f"have {channels}; set denoiser.channels to {channels}."
            )

    def build(self, rngs: nnx.Rngs) -> TextToImage:
        """The module that is trained, freshly drawn."""
        text = None if self._frozen_text else self.text.model
        return TextToImage(self.denoiser, text, rngs=rngs)

    def frozen(self) -> dict[str, Pretrained]:
        """The parts taken from elsewhere: which folder, which of its parts, and what module."""
        parts = {}
        if self.latents is not None:
            model = self.latents.model
            parts["autoencoder"] = Pretrained(
                self.latents.pretrained, (), lambda: Autoencoder(model, rngs=nnx.Rngs(0))
            )
        return parts | self._text_part() if self._frozen_text else parts

    def start(self) -> dict[str, Pretrained]:
        """A trained denoiser or text tower that is to learn on."""
        parts = {}
        if self.pretrained is not None:
            parts["denoiser"] = Pretrained(
                self.pretrained, ("denoiser",), lambda: _network(self.denoiser, nnx.Rngs(0))
            )
        as_drawn = self.text.pretrained is None
        return parts if self._frozen_text or as_drawn else parts | self._text_part()

    @property
    def _frozen_text(self) -> bool:
        return not self.text.trained

    def _text_part(self) -> dict[str, Pretrained]:
        folder, config = self.text.pretrained, self.text.model
        return {"text": Pretrained(folder, ("text",), lambda: ClipText(config, rngs=nnx.Rngs(0)))}

    def init_state(self) -> Any:
        """The curriculum at its first level."""
        return self.curriculum.init() if self.curriculum else ()

    def features(self, model: TextToImage, frozen: PyTree, ids: Int[Array, "b n"]) -> TextFeatures:
        """What the denoiser is told of prompts given as token ids."""
        if self._frozen_text:
            tower = merge(self.frozen()["text"].build, frozen["text"])
            return tower(ids, layer=self.text.layer)
        return model.text(ids, layer=self.text.layer)

    def encode(
        self, frozen: PyTree, images: Float[Array, "b h w 3"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b i j c"]:
        """Images in [-1, 1] to the space that is modelled; without a key, without noise."""
        if self.latents is None:
            return images
        autoencoder = merge(self.frozen()["autoencoder"].build, frozen["autoencoder"])
        z = autoencoder.encode(images)
        return autoencoder.to_latents(z.mode() if key is None else z.sample(key))

    def decode(self, frozen: PyTree, x: Float[Array, "b i j c"]) -> Float[Array, "b h w 3"]:
        """From the space that is modelled to images, about in [-1, 1]."""
        if self.latents is None:
            return x
        autoencoder = merge(self.frozen()["autoencoder"].build, frozen["autoencoder"])
        return autoencoder.decode(autoencoder.from_latents(x))

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Height, width and channels of what is modelled for images of this size."""
        factor = self.latents.model.downsampling if self.latents else 1
        return height // factor, width // factor, self.denoiser.channels

    def loss(
        self,
        model: TextToImage,
        frozen: PyTree,
        batch: Batch,
        key: Key[Array, ""],
        task_state: Any,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The objective's mean over the batch, and its sums by level of noise."""
        encode_key, loss_key = jax.random.split(key)
        text = self.features(model, frozen, batch["tokens"])
        x0 = self.encode(frozen, from_uint8(batch["image"]), encode_key)
        max_t = self.curriculum.max_t(task_state) if self.curriculum else 1.0
        result = self.objective.loss(lambda x, t: model.denoiser(x, t, text), x0, loss_key, max_t)
        sums, counts = loss_by_level(result.loss, result.t)
        loss = jnp.mean(result.loss)
        metrics = {"loss": loss, "loss_by_level_sum": sums, "loss_by_level_count": counts}
        if self.curriculum:
            metrics["max_t"] = jnp.asarray(max_t)
        return loss, metrics

    def next_state(self, task_state: Any, metrics: Metrics) -> Any:
        """The curriculum after this step's loss."""
        return self.curriculum.update(task_state, metrics["loss"]) if self.curriculum else ()
