"""The text conditioning of Z-Image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxdiff.config.checked import checked
from jaxdiff.models.conditioners.qwen3 import Qwen3Conditioner
from jaxdiff.models.conditioning import Conditioning, TextInputs


@checked
@dataclass(frozen=True, kw_only=True)
class ZImageConditioner(Qwen3Conditioner):
    """The last but one hidden state of a Qwen3, without padding."""

    def encode(self, params: Mapping[str, Any], inputs: TextInputs) -> Conditioning:
        """Encode prompts, as `encode_prompt` of diffusers' ZImagePipeline.

        Tokens of the text come first, on whichever side the padding is; those that the mask
        excludes are zero.
        """
        assert inputs.masks is not None
        mask = inputs.masks["text"]
        tokens = self.text.encode(params, "text", inputs.ids["text"], mask)
        order = jnp.argsort(~mask, axis=1, stable=True)
        mask = jnp.take_along_axis(mask, order, axis=1)
        tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
        return Conditioning(jnp.where(mask[..., None], tokens, 0), mask)
