"""The interface of text encoder settings."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from etils import epath
from flax import nnx

from jaxdiff.data.pretrained_tokenizer import PretrainedTokenizer
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.data.tokenizer_folders import is_own_folder
from jaxdiff.errors import UserError
from jaxdiff.models.layers import bind_build, bind_params
from jaxdiff.models.lora import add_adapters


class TextEncoder(abc.ABC):
    """Interface of text encoder settings: a frozen dataclass that can build its network.

    Attributes:
      takes_new_tokens: whether the network reads `params["added_tokens"]` beside its own parameter
        `token_embedding`, for textual inversion. Its tokenizer is then a `Tokenizer`.
      reads_mask: whether the network reads `TextInputs.masks`. Its tokenizer then has a method
        `encode`, which returns ids and mask.
    """

    takes_new_tokens: ClassVar[bool] = False
    reads_mask: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens of a prompt."""

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Width of token embeddings."""

    @abc.abstractmethod
    def build(self, *, rngs: nnx.Rngs) -> nnx.Module:
        """Initialise the network."""

    @abc.abstractmethod
    def flops(self) -> float:
        """FLOPs of one prompt."""

    def load_tokenizer(self, folder: str) -> TextTokenizer:
        """Load the tokenizer of a folder; by default a `Tokenizer`."""
        return Tokenizer.load(folder)

    def adapt_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """Adapt a tokenizer that was trained on captions; by default it stays as it is."""
        return tokenizer

    def check_tokenizer(self, tokenizer: Any, added: int = 0) -> None:  # noqa: B027
        """Check that the network accepts a tokenizer's ids; by default any."""

    def module(self, params: Mapping[str, Any], name: str) -> Any:
        """Return the network with its parameters and adapters, given those of a model."""
        module = bind_params(bind_build(self), params["text_encoders"][name])
        adapters = params.get("adapters", {}).get("text_encoders", {}).get(name)
        if adapters is not None:
            add_adapters(module, adapters)
        return module


class LanguageModelEncoder(TextEncoder):
    """A text encoder whose tokenizer has the files of a language model.

    Attributes:
      model: the network's size.
      max_length: tokens of a prompt, padding included.
      thinking: of the tokenizer's chat template, as in `PretrainedTokenizer.load`.
    """

    model: Any
    max_length: int
    thinking: bool | None = None

    @property
    def length(self) -> int:
        """Tokens of a prompt, padding included."""
        return self.max_length

    @property
    def width(self) -> int:
        """Width of token embeddings."""
        return self.model.width

    def load_tokenizer(self, folder: str) -> TextTokenizer:
        """Load a language model's tokenizer, or one that was trained on captions.

        Raises:
          UserError: as `PretrainedTokenizer.load`.
        """
        if is_own_folder(epath.Path(folder)):
            return Tokenizer.load(folder, length=self.length)
        return PretrainedTokenizer.load(folder, length=self.length, thinking=self.thinking)

    def adapt_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return a copy of the encoder's length."""
        return dataclasses.replace(tokenizer, length=self.length)

    def check_tokenizer(self, tokenizer: Any, added: int = 0) -> None:
        """Check lengths and ids.

        Raises:
          UserError: they differ from the network's.
        """
        check_ids(tokenizer, added, length=self.length, vocab_size=self.model.vocab_size)


def check_ids(tokenizer: Any, added: int, *, length: int, vocab_size: int) -> None:
    """Check a tokenizer's length, and that its ids, less `added` new ones, are in a vocabulary.

    Raises:
      UserError: they differ.
    """
    known = tokenizer.vocab_size - added
    if tokenizer.length != length or known > vocab_size:
        raise UserError(
            f"The tokenizer gives {tokenizer.length} tokens out of {known}, but the text encoder "
            f"takes {length} out of {vocab_size}: use the model's own tokenizer, or, in a recipe, "
            "set tokenizer.length and tokenizer.vocab_size to the encoder's length and vocab_size."
        )
