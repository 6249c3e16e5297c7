"""The interface of tokenizers of text encoders."""

import abc
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int32

# Letters and digits, with the vowel signs of scripts whose letters carry them; or one emoji.
_WORD = re.compile(
    r"(?:\w|[\u0300-\u036f\u0900-\u0dff\u0e00-\u109f])+"
    r"|[\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001f3fa\U0001f400-\U0001faff]"
)


def words_of(text: str) -> list[str]:
    """Return the words and emoji of a text, in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def first_letter(text: str, start: int, end: int) -> int:
    """Return the start of a token, after the space that some tokenizers include."""
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()) if piece.strip() else start


class TextTokenizer(abc.ABC):
    """Convert texts to token ids of one length; custom tokenizers inherit from it.

    Instances are immutable and can be pickled. `Conditioner.load_tokenizers` and
    `Conditioner.train_tokenizers` create them.
    """

    @abc.abstractmethod
    def __call__(self, texts: list[str]) -> Int32[np.ndarray, "b n"]:
        """Return the ids, padded or cut off to the length."""

    @abc.abstractmethod
    def weighted(
        self, segments: Sequence[tuple[str, float]]
    ) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Return the ids of the joined texts, and the weight of each id; 1 for padding."""

    @abc.abstractmethod
    def truncated(self, text: str) -> bool:
        """Return whether `text` has more tokens than fit."""

    @property
    def words(self) -> frozenset[str] | None:
        """The words that the model was trained on, in lower case; None where that is unknown."""
        return None

    @property
    def related(self) -> Mapping[str, tuple[str, ...]] | None:
        """Names in captions by words that are in none, such as cat and dog by pet."""
        return None

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that determines the ids of a text."""

    @abc.abstractmethod
    def save(self, folder: str) -> None:
        """Write files from which the conditioner loads the tokenizer to `folder`."""
