"""What a text-to-image model is made of: text encoders, a latent space, a denoiser, new words."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import Autoencoder, AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoder, TinyAutoencoderConfig
from jaxdiff.models.denoisers.dit import DiT, DiTConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig, UNet2DConditionModel
from jaxdiff.models.denoisers.unet_small import UNet, UNetConfig
from jaxdiff.models.layers import TextFeatures, blueprint
from jaxdiff.models.lora import LoraConfig, attach
from jaxdiff.models.text_encoders.clip import ClipText, ClipTextConfig
from jaxdiff.training.tasks.base import Pretrained


@dataclass(frozen=True, kw_only=True)
class TextTower:
    """The text encoder.

    Attributes:
      model: its size.
      pretrained: folder of the run or bundle, or `shipped:NAME`, whose text tower it starts as;
        None draws one. A tower that starts as drawn and learns along with the denoiser is in
        danger: before the denoiser heeds prompts they are noise to it, and the tower then learns
        to say the same of all of them.
      trained: whether it, or if it has adapters these, learn along with the denoiser.
      layer: which hidden state becomes the words that the denoiser reads, counted as
        `ClipText.__call__` does; 0 is the words alone, None the last.
      final_norm: whether the final layer norm is applied to these.
      pad_id: what follows a prompt's end becomes this id; None leaves the tokenizer's.
      lora: the adapters that it has, which are then all that is trained of it.
    """

    model: ClipTextConfig
    pretrained: str | None = None
    trained: bool = True
    layer: int | None = None
    final_norm: bool = True
    pad_id: int | None = None
    lora: LoraConfig | None = None

    def build(self, rngs: nnx.Rngs) -> ClipText:
        """The encoder, freshly drawn."""
        return _with_adapters(ClipText(self.model, rngs=rngs), self.lora, rngs)

    def read(self, encoder: ClipText, ids: Int[Array, "b n"]) -> TextFeatures:
        """Prompts given as token ids, in the eyes of this tower."""
        if self.pad_id is not None:
            mask = encoder.prompt_mask(ids)
            ids = jnp.where(mask, ids, self.pad_id)
        return encoder(ids, layer=self.layer, final_norm=self.final_norm)

    def with_rows(
        self, params: Mapping[str, Any], rows: Float[Array, "n d"]
    ) -> tuple["TextTower", dict[str, Any]]:
        """The encoder, and its weights, with vectors of new tokens after those of its vocabulary.

        What ends a prompt was the last token until now, and is named from here on.
        """
        table = params["token_embedding"]
        end_id = len(table) - 1 if self.model.end_id is None else self.model.end_id
        model = dataclasses.replace(self.model, vocab_size=len(table) + len(rows), end_id=end_id)
        longer = jnp.concatenate([table, rows.astype(table.dtype)])
        return dataclasses.replace(self, model=model), {**params, "token_embedding": longer}


@dataclass(frozen=True, kw_only=True)
class TextualInversion:
    """A new word for what some images show, learnt with all else frozen (Gal et al. 2022).

    Attributes:
      word: as captions and prompts have it; without spaces, and unlike any other.
      initial: what it means at first: a word or several that come near.
      vectors: tokens that it takes.

    Raises:
      UserError: no tokens, or nothing to start from.
    """

    word: str = "<my-thing>"
    initial: str = "thing"
    vectors: int = 1

    def __post_init__(self):
        if self.vectors < 1 or not self.initial.strip():
            raise UserError(
                f"TextualInversion got vectors={self.vectors} and initial={self.initial!r}: "
                "expected at least 1, and a word to start from."
            )

    def first_ids(self, tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
        """The tokens whose vectors it starts from."""
        ids = tokenizer([self.initial])[0]
        known = ids[1 : int(np.argmax(ids == tokenizer.end_id))]
        return np.resize(known, self.vectors)


class Words(nnx.Module):
    """The vectors that are learnt of a new word, by text encoder."""

    def __init__(self, towers: Mapping[str, TextTower], vectors: int):
        for name, tower in towers.items():
            setattr(self, name, nnx.Param(jnp.zeros((vectors, tower.model.width))))


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The latent space of a trained autoencoder.

    Attributes:
      model: the autoencoder.
      pretrained: folder of the run or bundle that holds it, or `shipped:NAME`.
    """

    model: AutoencoderConfig | TinyAutoencoderConfig
    pretrained: str

    def build(self, rngs: nnx.Rngs) -> Autoencoder | TinyAutoencoder:
        """The autoencoder, freshly drawn."""
        if isinstance(self.model, TinyAutoencoderConfig):
            return TinyAutoencoder(self.model, rngs=rngs)
        return Autoencoder(self.model, rngs=rngs)


Network = TypeVar("Network", bound=nnx.Module)


def _with_adapters(network: Network, lora: LoraConfig | None, rngs: nnx.Rngs) -> Network:
    if lora is not None:
        attach(network, lora, rngs)
    return network


DenoiserConfig = DiTConfig | UNetConfig | UNet2DConditionConfig


def denoiser_network(
    config: DenoiserConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs
) -> DiT | UNet | UNet2DConditionModel:
    """The denoiser, freshly drawn, with adapters if there are to be any."""
    match config:
        case DiTConfig():
            network = DiT(config, rngs=rngs)
        case UNetConfig():
            network = UNet(config, rngs=rngs)
        case UNet2DConditionConfig():
            network = UNet2DConditionModel(config, rngs=rngs)
    return _with_adapters(network, lora, rngs)


def text_part(name: str, tower: TextTower) -> Pretrained:
    """Where a text encoder's weights come from, and the module that they are of."""
    return Pretrained(tower.pretrained, (name,), blueprint(TextTower.build, tower))
