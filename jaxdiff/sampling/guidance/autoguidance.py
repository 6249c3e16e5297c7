"""Guidance by a weaker model: what it gets wrong more often is what to steer away from."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Autoguidance:
    """Which weaker model, and how far from it (Karras et al. 2024, arXiv 2406.02507, eq. 3).

    It is to err as the model does but more: the same recipe, trained for less time or smaller. The
    prompts stay the same, so that unlike classifier-free guidance this does not make images more
    alike. The two add up.

    Attributes:
      model: folder of a run or an exported model, or `shipped:NAME`, with the same tokenizer,
        latents and schedule.
      scale: w; 1 is without.
    """

    model: str
    scale: float = 1.5
