"""What FLUX.2 and Z-Image share: hidden states of one Qwen3."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdiff.config.checked import checked
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import Conditioner, TextInputs
from jaxdiff.models.text_encoders.qwen3 import Qwen3TextEncoder


@checked
@dataclass(frozen=True, kw_only=True)
class Qwen3Conditioner(Conditioner):
    """One Qwen3 whose hidden states are joined by channel; an absent prompt is the empty one.

    Attributes:
      text: the encoder.
    """

    text: Qwen3TextEncoder

    @property
    def encoders(self) -> Mapping[str, Qwen3TextEncoder]:
        """The text encoder, `text`."""
        return {"text": self.text}

    @property
    def text_width(self) -> int:
        """Width of the joined hidden states."""
        return self.text.joined_width

    @property
    def pooled_width(self) -> None:
        """There is no pooled vector."""
        return

    def tokenize_weighted(
        self,
        tokenizers: Mapping[str, Any],
        prompts: Sequence[Sequence[tuple[str, float]] | None],
    ) -> TextInputs:
        """Tokenize prompts given as segments (text, weight), on the host.

        Raises:
          UserError: a weight is not 1. The hidden states of a causal language model do not change
            in proportion to a word's importance.
        """
        texts = [
            None if segments is None else "".join(t for t, _ in segments) for segments in prompts
        ]
        for segments, text in zip(prompts, texts, strict=True):
            if any(weight != 1 for _, weight in segments or ()):
                raise UserError(
                    f"The prompt {text!r} weights words, which Qwen3, this model's text encoder, "
                    "does not support: expected a prompt without (words:1.3); describe what "
                    "matters in words, or escape the parentheses by a backslash."
                )
        return self.tokenize(tokenizers, texts)
