"""Autoguidance: guidance by a worse version of the model."""

from dataclasses import dataclass

from jaxdiff.config.checked import checked


@checked
@dataclass(frozen=True, kw_only=True)
class Autoguidance:
    """Guide away from a worse model's estimates (Karras et al. 2024, arXiv 2406.02507, eq. 3).

    The guide model should make similar but larger errors: the same recipe with less training, or a
    smaller network. Both models have the same prompts, so that unlike classifier-free guidance this
    does not reduce diversity. Both kinds of guidance may be combined.

    Attributes:
      model: folder of a run or an exported model, or `shipped:NAME`, with the same tokenizer,
        latents and schedule.
      scale: w; 1 has no effect.

    Raises:
      UserError: scale is not finite.
    """

    model: str
    scale: float = 1.5
