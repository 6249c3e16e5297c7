"""Tokenize the captions of a batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxdiff.models.conditioning import Conditioner, TextInputs


@dataclass(frozen=True)
class CaptionTokenizer:
    """Tokenizes captions; an empty one, the result of caption dropout, counts as absent."""

    conditioner: Conditioner
    tokenizers: Mapping[str, Any]

    def __call__(self, captions: list[str]) -> TextInputs:
        """Return the inputs of b captions, on the host."""
        return self.conditioner.tokenize(self.tokenizers, [caption or None for caption in captions])
