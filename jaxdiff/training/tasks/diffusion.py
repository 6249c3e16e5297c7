"""Training a denoiser, with its text encoder, on pixels or on an autoencoder's latents."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.curriculum import NoiseCurriculum
from jaxdiff.diffusion.losses import Objective, loss_by_level
from jaxdiff.distributed.sharding import split_tokens
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import Autoencoder, Gaussian
from jaxdiff.models.autoencoders.tiling import VaeMode
from jaxdiff.models.autoencoders.tiny import TinyAutoencoder
from jaxdiff.models.components import (
    DenoiserConfig,
    Latents,
    TextTower,
    TextualInversion,
    Words,
    denoiser_network,
    text_part,
)
from jaxdiff.models.convolutions import Wrap, wrap_convolutions
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.denoisers.unet_sd import (
    Conditions,
    UNet2DConditionConfig,
)
from jaxdiff.models.denoisers.unet_small import UNetConfig
from jaxdiff.models.layers import TextFeatures, bind_init, merge
from jaxdiff.models.lora import Adapters, LoraConfig, adapted
from jaxdiff.training.tasks.base import Batch, Metrics, Pretrained, Task, from_uint8

# The aesthetic scores that Stable Diffusion XL's refiner is told, of prompts and negative ones.
BEAUTY, NEGATIVE_BEAUTY = 6.0, 2.5


def whole(height: int, width: int, count: int) -> Int[Array, "b 6"]:
    """The framing of images of which nothing is cut off, and none is resized."""
    return jnp.broadcast_to(jnp.array([height, width, 0, 0, height, width]), (count, 6))


class TextToImage(nnx.Module):
    """What is trained of a task: its denoiser, text encoders, adapters, the vectors of a word."""

    def __init__(self, task: "DiffusionTask", *, rngs: nnx.Rngs):
        for name, tower in task.towers.items():
            if tower.trained:
                encoder = tower.build(rngs)
                setattr(self, name, encoder if tower.lora is None else Adapters(encoder))
        if task.inversion is not None:
            self.words = Words(task.towers, task.inversion.vectors)
        if task.lora is not None:
            self.denoiser = Adapters(denoiser_network(task.denoiser, task.lora, rngs=rngs))
        elif task.inversion is None:
            self.denoiser = denoiser_network(task.denoiser, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class DiffusionTask(Task):
    """Prediction of the noise, or of x0, v or velocity, given a prompt.

    Attributes:
      denoiser: the network.
      pretrained: folder of the run or bundle, or `shipped:NAME`, whose denoiser it starts as; None
        draws one.
      lora: adapters of the denoiser, which are then all that is trained of it.
      inversion: a new word, which is then all that is trained, beside adapters if there are any.
      text: the text encoder.
      text_2: a second one, whose tokens are joined to the first one's, channel by channel, and
        whose pooled vector takes the place of the first one's (Stable Diffusion XL).
      zero_empty_prompt: an empty prompt is all zeros to the denoiser (Stable Diffusion XL).
      latents: the space that is modelled; None for pixels.
      objective: what the network predicts, on which noise, and how errors count.
      curriculum: little noise first; None draws all levels from the start.
    """

    denoiser: DenoiserConfig
    pretrained: str | None = None
    lora: LoraConfig | None = None
    inversion: TextualInversion | None = None
    text: TextTower
    text_2: TextTower | None = None
    zero_empty_prompt: bool = False
    latents: Latents | None = None
    objective: Objective
    curriculum: NoiseCurriculum | None = None

    def __post_init__(self):
        denoiser, models = self.denoiser, [tower.model for tower in self.towers.values()]
        width = sum(model.width for model in models)
        pooled = models[-1].projection_dim or models[-1].width
        reads_pooled = isinstance(denoiser, DiTConfig | UNetConfig)
        if width != denoiser.text_width or (reads_pooled and pooled != denoiser.pooled_width):
            wanted = f" and {denoiser.pooled_width} (pooled)" if reads_pooled else ""
            raise UserError(
                f"The denoiser expects text of widths {denoiser.text_width}{wanted} but the text "
                f"encoder gives {width} and {pooled}; make denoiser.text_width and "
                "denoiser.pooled_width those."
            )
        channels = self.latents.model.latent_channels if self.latents else 3
        if channels != denoiser.channels:
            raise UserError(
                f"The denoiser works on {denoiser.channels} channels but the images it is given "
                f"have {channels}; set denoiser.channels to {channels}."
            )
        if self.denoiser_is_frozen and self.pretrained is None:
            raise UserError(
                "LoRA and textual inversion need a denoiser that is trained already: name its "
                "model in task.pretrained."
            )
        if any(t.trained and t.lora and t.pretrained is None for t in self.towers.values()):
            raise UserError(
                "LoRA adapts a text encoder that is trained already: name its model in "
                "task.text.pretrained."
            )
        if self.inversion is not None and any(tower.trained for tower in self.towers.values()):
            raise UserError(
                "Textual inversion learns a word for text encoders that stay as they are: set "
                "task.text.trained to False."
            )

    @property
    def denoiser_is_frozen(self) -> bool:
        """Whether the denoiser's own weights stay as they are."""
        return self.lora is not None or self.inversion is not None

    @property
    def downsampling(self) -> int:
        """Pixels to one position of what is modelled, along each side."""
        return self.latents.model.downsampling if self.latents else 1

    @property
    def towers(self) -> dict[str, TextTower]:
        """The text encoders by name; the last one's pooled vector counts."""
        return {"text": self.text} | ({"text_2": self.text_2} if self.text_2 else {})

    @property
    def text_size(self) -> int:
        """Numbers that `pack` makes of a prompt."""
        last = list(self.towers.values())[-1].model
        length, pooled = self.text.model.length, last.projection_dim or last.width
        if self._reads_words_alone:
            return pooled
        return length * self.denoiser.text_width + pooled + length

    @property
    def _reads_words_alone(self) -> bool:
        """Whether tokens are words as they stand in a table: quicker looked up than read back."""
        return all(tower.layer == 0 for tower in self.towers.values())

    def pack(self, text: TextFeatures) -> Float[Array, "b m"]:
        """What is cached of prompts: all that takes a text encoder's layers to find out."""
        return text.pooled if self._reads_words_alone else text.pack()

    def unpack(
        self, rows: Float[Array, "b m"], frozen: PyTree, ids: Int[Array, "b n"]
    ) -> TextFeatures:
        """The inverse of `pack`, in float32, given the same prompts as token ids."""
        if self._reads_words_alone:  # and what `read` makes of the layers is never computed
            return self.read(None, frozen, ids)._replace(pooled=rows.astype(jnp.float32))
        return TextFeatures.unpack(rows, ids.shape[1], self.denoiser.text_width)

    def build(self, rngs: nnx.Rngs) -> TextToImage:
        """The module that is trained, freshly drawn."""
        return TextToImage(self, rngs=rngs)

    def frozen(self) -> dict[str, Pretrained]:
        """The parts taken from elsewhere: which folder, which of its parts, and what module."""
        parts = {}
        if self.latents is not None:
            parts["autoencoder"] = Pretrained(
                self.latents.pretrained, (), bind_init(Latents.build, self.latents)
            )
        for name, tower in self.towers.items():
            if not tower.trained:
                parts[name] = text_part(name, tower)
            elif tower.lora is not None:
                parts[name] = text_part(name, dataclasses.replace(tower, lora=None))
        if self.denoiser_is_frozen:
            parts["denoiser"] = self._denoiser_part()
        return parts

    def _denoiser_part(self) -> Pretrained:
        return Pretrained(
            self.pretrained, ("denoiser",), bind_init(denoiser_network, self.denoiser)
        )

    def start(self) -> dict[str, Pretrained]:
        """A trained denoiser or text tower that is to learn on."""
        parts = {}
        if self.pretrained is not None and not self.denoiser_is_frozen:
            parts["denoiser"] = self._denoiser_part()
        for name, tower in self.towers.items():
            if tower.trained and tower.pretrained is not None and tower.lora is None:
                parts[name] = text_part(name, tower)
        return parts

    def derive(self, frozen: PyTree, tokenizer: Tokenizer) -> dict[str, PyTree]:
        """A new word starts as the one that comes near it.

        Raises:
          UserError: the tokenizer does not give the text encoders' last token as its own last.
        """
        if self.inversion is None:
            return {}
        ids = self.inversion.first_ids(tokenizer)
        words = {}
        for name in self.towers:
            table = jax.device_get(frozen[name]["token_embedding"])
            if len(table) + self.inversion.vectors != tokenizer.vocab_size:
                raise UserError(
                    f"The tokenizer has {tokenizer.vocab_size - self.inversion.vectors} tokens and "
                    f"the text encoder {len(table)}: new words need as many of one as of the other."
                )
            words[name] = table[ids]
        return {"words": words}

    def init_state(self) -> Any:
        """The curriculum at its first level."""
        return self.curriculum.init() if self.curriculum else ()

    def network(self, model: TextToImage, frozen: PyTree) -> Any:
        """The denoiser, called with x_t, t and features, with its adapters where it has them."""
        if not self.denoiser_is_frozen:
            return model.denoiser
        if self.lora is None:
            return merge(bind_init(denoiser_network, self.denoiser), frozen["denoiser"])
        build = bind_init(denoiser_network, self.denoiser, self.lora)
        adapters = nnx.to_pure_dict(nnx.state(model.denoiser))
        return merge(build, adapted(frozen["denoiser"], adapters))

    def features(
        self,
        model: TextToImage,
        frozen: PyTree,
        ids: Int[Array, "b n"],
        framing: Int[Array, "b 6"],
        beauty: float = BEAUTY,
    ) -> Any:
        """What the denoiser is told of prompts given as token ids, and of the images' framing.

        `Conditions` for Stable Diffusion's U-Net, `TextFeatures` for the others. Stable Diffusion
        XL alone takes notice of the framing (`jaxdiff.data.transforms.Example` says what it is),
        and its refiner of the `beauty`, an aesthetic score.
        """
        return self._told(self.read(model, frozen, ids), framing, beauty)

    def read(
        self, model: TextToImage | None, frozen: PyTree, ids: Int[Array, "b n"]
    ) -> TextFeatures:
        """What the text encoders say of prompts; without a `model` where nothing of it is trained.

        That is all that can be cached of a caption.
        """
        read = []
        for name, tower in self.towers.items():
            if tower.trained and tower.lora is None:
                encoder = getattr(model, name)
            else:
                params = frozen[name]
                if tower.trained:
                    params = adapted(params, nnx.to_pure_dict(nnx.state(getattr(model, name))))
                if self.inversion is not None and model is not None:
                    tower, params = tower.with_rows(params, getattr(model.words, name)[...])
                encoder = merge(text_part(name, tower).build, params)
            read.append(tower.read(encoder, ids))
        tokens = jnp.concatenate([features.tokens for features in read], axis=-1)
        return TextFeatures(tokens, read[-1].pooled, read[0].mask)

    def _told(self, text: TextFeatures, framing: Int[Array, "b 6"], beauty: float) -> Any:
        if self.zero_empty_prompt:
            said = text.mask[:, 2].astype(text.tokens.dtype)  # more than a start and an end
            tokens, pooled = text.tokens * said[:, None, None], text.pooled * said[:, None]
            text = text._replace(tokens=tokens, pooled=pooled)
        if not isinstance(self.denoiser, UNet2DConditionConfig):
            return text
        if self.denoiser.added_width is None:
            return Conditions(text.tokens)
        time_ids = framing.astype(jnp.float32)
        count = (self.denoiser.added_width - text.pooled.shape[-1]) // self.denoiser.time_id_width
        if count < time_ids.shape[1]:  # the refiner, told of beauty in the place of the final size
            time_ids = jnp.pad(time_ids[:, :4], ((0, 0), (0, 1)), constant_values=beauty)
        return Conditions(text.tokens, text.pooled, time_ids)

    def encode(
        self,
        frozen: PyTree,
        images: Float[Array, "b h w 3"],
        key: Key[Array, ""] | None = None,
        by: VaeMode = "whole",
        wrap: Wrap = (False, False),
    ) -> Float[Array, "b i j c"]:
        """Images in [-1, 1] to the space that is modelled; without a key, without noise."""
        if self.latents is None:
            return images
        autoencoder = self._autoencoder(frozen, wrap)
        z = autoencoder.encode(images, by)
        return autoencoder.to_latents(z.mode() if key is None else z.sample(key))

    def x0(self, frozen: PyTree, batch: Batch, key: Key[Array, ""]) -> Float[Array, "b i j c"]:
        """What is modelled of a batch of images, or of the latents that were cached of them.

        Both draw z by the same key: x0 = scale (mean + exp(logvar / 2) eps - shift).
        """
        if "latents" not in batch:
            return self.encode(frozen, from_uint8(batch["image"]), key)
        mean, logvar = jnp.split(batch["latents"].astype(jnp.float32), 2, axis=-1)
        return self._autoencoder(frozen, (False, False)).to_latents(
            Gaussian(mean, logvar).sample(key)
        )

    def decode(
        self,
        frozen: PyTree,
        x: Float[Array, "b i j c"],
        by: VaeMode = "whole",
        wrap: Wrap = (False, False),
    ) -> Float[Array, "b h w 3"]:
        """From the space that is modelled to images, about in [-1, 1].

        `by` is what goes through at a time, and `wrap` whether images go on at their other side.
        """
        if self.latents is None:
            return x
        autoencoder = self._autoencoder(frozen, wrap)
        return autoencoder.decode(autoencoder.from_latents(x), by)

    def _autoencoder(self, frozen: PyTree, wrap: Wrap) -> Autoencoder | TinyAutoencoder:
        autoencoder = merge(self.frozen()["autoencoder"].build, frozen["autoencoder"])
        wrap_convolutions(autoencoder, wrap)
        return autoencoder

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Height, width and channels of what is modelled for images of this size."""
        return height // self.downsampling, width // self.downsampling, self.denoiser.channels

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
        if "text" in batch:
            read = self.unpack(batch["text"], frozen, batch["tokens"])
        else:
            read = self.read(model, frozen, batch["tokens"])
        text = self._told(read, batch["framing"], BEAUTY)
        x0 = split_tokens(self.x0(frozen, batch, encode_key))
        max_t = self.curriculum.max_t(task_state) if self.curriculum else 1.0
        network = self.network(model, frozen)
        result = self.objective.loss(lambda x, t: network(x, t, text), x0, loss_key, max_t)
        sums, counts = loss_by_level(result.loss, result.t)
        loss = jnp.mean(result.loss)
        metrics = {"loss": loss, "loss_by_level_sum": sums, "loss_by_level_count": counts}
        if self.curriculum:
            metrics["max_t"] = jnp.asarray(max_t)
        return loss, metrics

    def next_state(self, task_state: Any, metrics: Metrics) -> Any:
        """The curriculum after this step's loss."""
        return self.curriculum.update(task_state, metrics["loss"]) if self.curriculum else ()
