"""The text conditioning of FLUX.1: T5's tokens, and CLIP's pooled vector."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxdiff.config.checked import checked
from jaxdiff.models.conditioning import (
    ClipTextEncoder,
    Conditioner,
    Conditioning,
    TextInputs,
    weight_tokens,
)
from jaxdiff.models.text_encoders.base import TextEncoder
from jaxdiff.models.text_encoders.t5 import T5TextEncoder


@checked
@dataclass(frozen=True, kw_only=True)
class Flux1Conditioner(Conditioner):
    """FLUX.1's text encoders; an absent prompt is the empty one.

    The denoiser reads padding too. Weights of words apply to T5's tokens alone.

    Attributes:
      text: CLIP; the denoiser reads only its pooled vector.
      text_2: T5.
    """

    masked = False
    text: ClipTextEncoder
    text_2: T5TextEncoder

    @property
    def encoders(self) -> Mapping[str, TextEncoder]:
        """`text` and `text_2`."""
        return {"text": self.text, "text_2": self.text_2}

    @property
    def text_width(self) -> int:
        """Width of T5's tokens."""
        return self.text_2.width

    @property
    def pooled_width(self) -> int:
        """Width of CLIP's pooled vector."""
        return self.text.pooled_width

    @property
    def text_length(self) -> int:
        """Number of T5's tokens."""
        return self.text_2.length

    def encode(self, params: Mapping[str, Any], inputs: TextInputs) -> Conditioning:
        """Encode prompts, as `encode_prompt` of diffusers' FluxPipeline."""
        tokens = self.text_2.encode(params, "text_2", inputs.ids["text_2"])
        if inputs.weights is not None and inputs.empty is not None:
            empty = self.text_2.encode(params, "text_2", inputs.empty["text_2"][:1])
            tokens = weight_tokens(tokens, empty, inputs.weights["text_2"])
        pooled = self.text.encode(params, "text", inputs.ids["text"]).pooled
        return Conditioning(tokens, pooled=pooled)
