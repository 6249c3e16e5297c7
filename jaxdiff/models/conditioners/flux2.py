"""The text conditioning of FLUX.2 klein."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxdiff.config.checked import checked
from jaxdiff.models.conditioners.qwen3 import Qwen3Conditioner
from jaxdiff.models.conditioning import Conditioning, TextInputs


@checked
@dataclass(frozen=True, kw_only=True)
class Flux2Conditioner(Qwen3Conditioner):
    """Three hidden states of a Qwen3; the denoiser reads those of padding too."""

    masked = False

    def encode(self, params: Mapping[str, Any], inputs: TextInputs) -> Conditioning:
        """Encode prompts, as `encode_prompt` of diffusers' Flux2KleinPipeline."""
        assert inputs.masks is not None
        return Conditioning(
            self.text.encode(params, "text", inputs.ids["text"], inputs.masks["text"])
        )
