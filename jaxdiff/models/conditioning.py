"""Conditioning, the inputs of a denoiser beside x_t and t, and conditioners, which encode text.

A conditioner is a frozen dataclass per model family. It defines the text encoders, their hidden
layers, concatenation and padding, and the meaning of an empty or absent prompt.

    prompts --tokenize--> TextInputs --encode(params)--> Conditioning --> denoiser, guidance
"""

import abc
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.config.checked import checked
from jaxdiff.config.serialization import to_json
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.text_encoders.base import TextEncoder, check_ids
from jaxdiff.models.text_encoders.clip import ClipText, ClipTextConfig, TextFeatures

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""Inputs of Stable Diffusion XL's refiner for prompts and for negative prompts."""


class Conditioning(NamedTuple):
    """Batch-first arrays; None where a family has no such field.

    Attributes:
      tokens: hidden states of the text, concatenated over the text encoders.
      mask: true for the tokens that count; None where the network reads all of them.
      pooled: one vector for the whole prompt.
      size_crop: original height and width, top and left of the crop, target height and width, in
        pixels (Podell et al. 2023, section 2.2).
      aesthetic_score: of the image, 0 to 10.
      guidance: the guidance scale, an input of guidance-distilled networks.
      concat: channels concatenated to x_t: mask and masked latents of inpainting networks.
      reference: tokens of reference images.
      reference_positions: their positions.
      image_tokens: an image encoder's tokens.
      control: a control image.
    """

    tokens: Float[Array, "b n d"] | None = None
    mask: Bool[Array, "b n"] | None = None
    pooled: Float[Array, "b e"] | None = None
    size_crop: Float[Array, "b 6"] | None = None
    aesthetic_score: Float[Array, " b"] | None = None
    guidance: Float[Array, " b"] | None = None
    concat: Float[Array, "b h w k"] | None = None
    reference: Float[Array, "b m r"] | None = None
    reference_positions: Int[Array, "b m axes"] | None = None
    image_tokens: Float[Array, "b i f"] | None = None
    control: Float[Array, "b y x 3"] | None = None


def full_size_crop(height: int, width: int, count: int) -> Float[Array, "b 6"]:
    """Return `size_crop` of images that were neither resized nor cropped."""
    numbers = jnp.array([height, width, 0, 0, height, width], jnp.float32)
    return jnp.broadcast_to(numbers, (count, 6))


def mix(a: Conditioning, b: Conditioning, fraction: Float[Array, " b"]) -> Conditioning:
    """Interpolate between two prompts: (1 - fraction) a + fraction b.

    Tokens that the mask excludes count as zero. A token of the result is masked in unless both
    prompts exclude it; a prompt with fraction 0 has no effect.
    """
    a, b = _zero_masked(a), _zero_masked(b)

    def interpolate(x: Array, y: Array) -> Array:
        f = fraction.reshape(-1, *[1] * (x.ndim - 1))
        if x.dtype == bool:
            return (x & (f < 1)) | (y & (f > 0))
        return ((1 - f) * x + f * y).astype(x.dtype)

    return jax.tree.map(interpolate, a, b)


def _zero_masked(cond: Conditioning) -> Conditioning:
    if cond.tokens is None or cond.mask is None:
        return cond
    return cond._replace(tokens=cond.tokens * cond.mask[..., None].astype(cond.tokens.dtype))


class TextInputs(NamedTuple):
    """Tokenized prompts, by text encoder.

    Attributes:
      ids: token ids [b, n] by text encoder.
      absent: true for a prompt that was not given, which in some families differs from "".
      masks: true for tokens of the text, by text encoder; None where `ids` determine it.
      weights: weights of the words [b, n] by text encoder; None where all are 1.
      empty: ids of "" in the shape of `ids`; only with `weights`.
    """

    ids: Mapping[str, Any]
    absent: Any
    masks: Mapping[str, Any] | None = None
    weights: Mapping[str, Any] | None = None
    empty: Mapping[str, Any] | None = None


class Conditioner(abc.ABC):
    """Interface of conditioners; a family's own is a frozen dataclass that inherits it.

    Attributes:
      masked: whether `encode` returns a mask, `Conditioning.mask`.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # of those that inherit it

    masked: bool = True

    @property
    @abc.abstractmethod
    def encoders(self) -> Mapping[str, TextEncoder]:
        """The text encoders by name, the key in `params["text_encoders"]`."""

    @property
    @abc.abstractmethod
    def text_width(self) -> int:
        """Width of `Conditioning.tokens`."""

    @property
    @abc.abstractmethod
    def pooled_width(self) -> int | None:
        """Width of `Conditioning.pooled`; None where there is none."""

    @abc.abstractmethod
    def encode(self, params: Mapping[str, Any], inputs: TextInputs) -> Conditioning:
        """Encode prompts, given a model's parameters."""

    @property
    def text_length(self) -> int:
        """Number of text tokens that the denoiser reads."""
        return max(encoder.length for encoder in self.encoders.values())

    def tokenize(self, tokenizers: Mapping[str, Any], prompts: Sequence[str | None]) -> TextInputs:
        """Tokenize prompts, on the host; None is a prompt that is not given."""
        texts = [prompt or "" for prompt in prompts]
        absent = np.array([prompt is None for prompt in prompts], bool)
        ids, masks = {}, {}
        for name, encoder in self.encoders.items():
            if encoder.reads_mask:
                ids[name], masks[name] = tokenizers[name].encode(texts)
            else:
                ids[name] = tokenizers[name](texts)
        return TextInputs(ids, absent, masks or None)

    def tokenize_weighted(
        self,
        tokenizers: Mapping[str, Any],
        prompts: Sequence[Sequence[tuple[str, float]] | None],
    ) -> TextInputs:
        """Tokenize prompts given as segments (text, weight), on the host."""
        absent = np.array([segments is None for segments in prompts], bool)
        texts = [segments or (("", 1.0),) for segments in prompts]
        ids, weights, empty = {}, {}, {}
        for name in self.encoders:
            pairs = [tokenizers[name].weighted(segments) for segments in texts]
            ids[name] = np.stack([one for one, _ in pairs])
            weights[name] = np.stack([weight for _, weight in pairs])
            empty[name] = tokenizers[name]([""] * len(texts))
        if all((w == 1).all() for w in weights.values()):
            return TextInputs(ids, absent)
        return TextInputs(ids, absent, weights=weights, empty=empty)

    def abstract_inputs(self, batch_size: int) -> TextInputs:
        """Return shapes and types of the output of `tokenize` for a batch."""
        shapes = {name: (batch_size, encoder.length) for name, encoder in self.encoders.items()}
        ids = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
        masks = {
            name: jax.ShapeDtypeStruct(shape, jnp.bool_)
            for name, shape in shapes.items()
            if self.encoders[name].reads_mask
        }
        return TextInputs(ids, jax.ShapeDtypeStruct((batch_size,), jnp.bool_), masks or None)

    def train_tokenizers(
        self, captions: Iterable[str], *, vocab_size: int, length: int
    ) -> Mapping[str, TextTokenizer]:
        """Train one tokenizer on captions, for all text encoders; by default a `Tokenizer`."""
        tokenizer = Tokenizer.train(captions, vocab_size=vocab_size, length=length)
        encoders = self.encoders.items()
        return {name: encoder.adapt_tokenizer(tokenizer) for name, encoder in encoders}

    def load_tokenizers(self, folder: str) -> Mapping[str, TextTokenizer]:
        """Load the tokenizers that `tokenizer.save` wrote into `folder`/NAME."""
        encoders = self.encoders.items()
        return {name: encoder.load_tokenizer(f"{folder}/{name}") for name, encoder in encoders}

    def pack(self, cond: Conditioning) -> Float[Array, "b m"]:
        """Flatten encoded captions to the rows of a cache."""
        fields = (cond.tokens, cond.pooled, cond.mask)
        return jnp.concatenate([x.reshape(len(x), -1) for x in fields if x is not None], axis=-1)

    @property
    def unpacks_alone(self) -> bool:
        """Whether `unpack` reads no parameters; by default true."""
        return True

    def unpack(
        self, rows: Float[Array, "b m"], params: Mapping[str, Any], inputs: TextInputs
    ) -> Conditioning:
        """Invert `pack`, in float32, given the parameters and the same captions' inputs."""
        del params
        length, rows = self.text_length, rows.astype(jnp.float32)
        pooled = self.pooled_width or 0
        ends = length * self.text_width, length * self.text_width + pooled
        tokens, vector, mask = jnp.split(rows, ends, axis=-1)
        return self.with_absent(
            Conditioning(
                tokens=tokens.reshape(-1, length, self.text_width),
                pooled=vector if pooled else None,
                mask=mask > 0 if self.masked else None,
            ),
            inputs,
        )

    @property
    def packed_size(self) -> int:
        """Numbers in a row of `pack`."""
        return self.text_length * (self.text_width + self.masked) + (self.pooled_width or 0)

    def with_absent(self, cond: Conditioning, inputs: TextInputs) -> Conditioning:
        """Replace the conditioning of absent prompts; by default they are as the empty one."""
        del inputs
        return cond

    def fingerprint(self, tokenizers: Mapping[str, Any]) -> str:
        """Return the SHA-256, in hex, of settings and tokenizers, without the weights."""
        words = {name: tokenizers[name].fingerprint for name in self.encoders}
        return hashlib.sha256(json.dumps([to_json(self), words]).encode()).hexdigest()

    def flops(self) -> float:
        """FLOPs of encoding one prompt."""
        return sum(encoder.flops() for encoder in self.encoders.values())

    def check_new_tokens(self) -> None:
        """Raise `UserError` unless all text encoders take new tokens."""
        for name, encoder in self.encoders.items():
            if not encoder.takes_new_tokens:
                raise UserError(
                    f"The text encoder {name}, a {type(encoder).__name__}, takes no new tokens: "
                    "expected a model whose text encoders do, such as CLIP, for textual inversion."
                )

    def check_tokenizers(self, tokenizers: Mapping[str, Any], added: int = 0) -> None:
        """Check that each encoder accepts its tokenizer's ids, less `added` new tokens.

        Raises:
          UserError: there is none, or it has another length, or ids beyond the vocabulary.
        """
        for name, encoder in self.encoders.items():
            if name not in tokenizers:
                raise UserError(
                    f"The model has no tokenizer for its text encoder {name}: expected one beside "
                    "its weights; copy the whole folder of the model."
                )
            encoder.check_tokenizer(tokenizers[name], added)


@checked
@dataclass(frozen=True, kw_only=True)
class ClipTextEncoder(TextEncoder):
    """A CLIP text encoder and the hidden state that the denoiser reads.

    Attributes:
      model: the network's size.
      hidden_layer: which hidden state becomes the tokens, counted as `ClipText.__call__` does; 0
        is the token embeddings alone, None the last.
      final_norm: whether the final layer norm is applied to it.
    """

    takes_new_tokens: ClassVar[bool] = True
    model: ClipTextConfig
    hidden_layer: int | None = None
    final_norm: bool = True

    @property
    def length(self) -> int:
        """Tokens of a prompt, start and end included."""
        return self.model.length

    @property
    def width(self) -> int:
        """Width of its tokens."""
        return self.model.width

    @property
    def pooled_width(self) -> int:
        """Width of its pooled vector."""
        return self.model.projection_dim or self.model.width

    def build(self, *, rngs: nnx.Rngs) -> ClipText:
        """Initialise the network."""
        return ClipText(self.model, rngs=rngs)

    def flops(self) -> float:
        """FLOPs of one prompt."""
        return self.model.flops()

    def check_tokenizer(self, tokenizer: Any, added: int = 0) -> None:
        """Check lengths and ids.

        Raises:
          UserError: they differ from the network's.
        """
        check_ids(tokenizer, added, length=self.length, vocab_size=self.model.vocab_size)

    def encode(self, params: Mapping[str, Any], name: str, ids: Int[Array, "b n"]) -> TextFeatures:
        """Encode token ids with the parameters of the encoder `name` of a model."""
        return self.module(params, name)(
            ids,
            hidden_layer=self.hidden_layer,
            final_norm=self.final_norm,
            added_tokens=params.get("added_tokens", {}).get(name),
        )


def weight_tokens(
    tokens: Float[Array, "b n d"],
    empty: Float[Array, "1 n d"],
    weights: Float[Array, "b n"],
) -> Float[Array, "b n d"]:
    """Scale the difference between tokens and those of the empty prompt.

    As ComfyUI, and as compel for weights above 1. A plain factor would also scale the component
    that all prompts share.
    """
    more = (weights - 1)[..., None].astype(empty.dtype)
    return tokens + more * (tokens - empty)


@checked
@dataclass(frozen=True, kw_only=True)
class ClipConditioner(Conditioner):
    """One CLIP text encoder, as in the small models and Stable Diffusion 1 and 2.

    Attributes:
      text: the encoder.
      masked: whether attention masks the padding; Stable Diffusion attends to all tokens.
    """

    text: ClipTextEncoder
    masked: bool = True

    @property
    def encoders(self) -> Mapping[str, ClipTextEncoder]:
        """The text encoder, `text`."""
        return {"text": self.text}

    @property
    def text_width(self) -> int:
        """Width of its tokens."""
        return self.text.width

    @property
    def pooled_width(self) -> int:
        """Width of its pooled vector."""
        return self.text.pooled_width

    def encode(self, params: Mapping[str, Any], inputs: TextInputs) -> Conditioning:
        """Encode prompts; an absent one is the empty one."""
        text = self.text.encode(params, "text", inputs.ids["text"])
        tokens = text.tokens
        if inputs.weights is not None and inputs.empty is not None:
            empty = self.text.encode(params, "text", inputs.empty["text"][:1]).tokens
            tokens = weight_tokens(tokens, empty, inputs.weights["text"])
        return Conditioning(tokens, text.mask if self.masked else None, text.pooled)

    @property
    def _caches_only_pooled(self) -> bool:
        """Whether the tokens are embedding lookups, which need no cache."""
        return self.text.hidden_layer == 0

    @property
    def unpacks_alone(self) -> bool:
        """False where the tokens are not cached."""
        return not self._caches_only_pooled

    def pack(self, cond: Conditioning) -> Float[Array, "b m"]:
        """Flatten encoded captions; where tokens are embeddings, only the pooled vector."""
        if self._caches_only_pooled:
            assert cond.pooled is not None
            return cond.pooled
        return super().pack(cond)

    def unpack(
        self, rows: Float[Array, "b m"], params: Mapping[str, Any], inputs: TextInputs
    ) -> Conditioning:
        """Invert `pack`."""
        if self._caches_only_pooled:  # XLA removes the unused layers
            return self.encode(params, inputs)._replace(pooled=rows.astype(jnp.float32))
        return super().unpack(rows, params, inputs)

    @property
    def packed_size(self) -> int:
        """Numbers in a row of `pack`."""
        if self._caches_only_pooled:
            return self.pooled_width
        return super().packed_size


@checked
@dataclass(frozen=True, kw_only=True)
class StableDiffusionXLConditioner(Conditioner):
    """Stable Diffusion XL's text encoders (Podell et al. 2023, section 2.1).

    Their tokens are concatenated by channel; the pooled vector is that of the second.

    Attributes:
      text: OpenAI's CLIP; None for the refiner, which has only the second.
      text_2: OpenCLIP.
      zero_absent: an absent prompt is all zeros, rather than the encoded "".
    """

    masked = False
    text: ClipTextEncoder | None = None
    text_2: ClipTextEncoder
    zero_absent: bool = True

    @property
    def encoders(self) -> Mapping[str, ClipTextEncoder]:
        """`text`, if there is one, and `text_2`."""
        second = {"text_2": self.text_2}
        return second if self.text is None else {"text": self.text, **second}

    @property
    def text_width(self) -> int:
        """Width of the concatenated tokens."""
        return sum(encoder.width for encoder in self.encoders.values())

    @property
    def pooled_width(self) -> int:
        """Width of the second encoder's pooled vector."""
        return self.text_2.pooled_width

    def encode(self, params: Mapping[str, Any], inputs: TextInputs) -> Conditioning:
        """Encode prompts."""
        tokens, pooled = self._encode(params, inputs.ids)
        if inputs.weights is not None and inputs.empty is not None:
            empty, _ = self._encode(params, {name: ids[:1] for name, ids in inputs.empty.items()})
            weights = inputs.weights["text_2"]
            tokens = weight_tokens(tokens, empty, weights)
        return self.with_absent(Conditioning(tokens, pooled=pooled), inputs)

    def _encode(
        self, params: Mapping[str, Any], ids: Mapping[str, Int[Array, "b n"]]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b e"]]:
        texts = [encoder.encode(params, n, ids[n]) for n, encoder in self.encoders.items()]
        return jnp.concatenate([text.tokens for text in texts], axis=-1), texts[-1].pooled

    def with_absent(self, cond: Conditioning, inputs: TextInputs) -> Conditioning:
        """Zero the conditioning of absent prompts, if the model was trained so."""
        if not self.zero_absent or cond.tokens is None or cond.pooled is None:
            return cond
        given = ~inputs.absent
        return cond._replace(
            tokens=cond.tokens * given[:, None, None].astype(cond.tokens.dtype),
            pooled=cond.pooled * given[:, None].astype(cond.pooled.dtype),
        )
