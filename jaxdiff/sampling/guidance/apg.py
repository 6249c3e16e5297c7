"""Adaptive projected guidance: strong guidance that does not oversaturate.

What the prompt changes, d = cond - uncond, in x0 (Sadat et al. 2024, arXiv 2410.02416, section 4):

    m = d + momentum m_before                                                      (1)
    m' = m min(1, norm_threshold / |m|)                                            (2)
    guided = cond + (guidance_scale - 1) (m' - (1 - eta) <m', cond> / |cond|^2 cond)   (3)

The part of m' that is parallel to cond makes for contrast and saturation more than for likeness.
Norms and products are over each image.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.process import Images
from jaxdiff.errors import UserError

_PIXELS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class APG:
    """What is done to the difference that the prompt makes; eta=1, 0 and None leave it as it is.

    Attributes:
      eta: what counts of the parallel part, from 0, nothing, to 1, all.
      momentum: of the differences of the steps before; negative ones, -0.75 to -0.5 in the paper,
        have steps differ from each other. More than -1 and less than 1.
      norm_threshold: the greatest length of the difference; None for any. It grows with the root
        of the number of values of an image: the paper has 15 for Stable Diffusion XL.

    Raises:
      UserError: a number out of range.
    """

    eta: float = 0.0
    momentum: float = 0.0
    norm_threshold: float | None = None

    def __post_init__(self):
        longest = self.norm_threshold
        if not (0 <= self.eta <= 1 and -1 < self.momentum < 1) or (
            longest is not None and longest <= 0
        ):
            raise UserError(
                f"APG got eta={self.eta}, momentum={self.momentum}, norm_threshold={longest}; give "
                "an eta in [0, 1], a momentum between -1 and 1, and a positive threshold or none."
            )

    def projected(self, difference: Images, cond: Images) -> Images:
        """Eq. 2 and 3: what the guidance scale less 1 is multiplied by, of a difference m."""
        if self.norm_threshold is not None:
            length = jnp.sqrt(_dot(difference, difference))
            difference = difference * jnp.minimum(1.0, self.norm_threshold / length)
        if self.eta == 1:
            return difference
        return difference - (1 - self.eta) * along(difference, cond) * cond


def along(a: Images, b: Images) -> Float[Array, "b 1 1 1"]:
    """How much of b is in a, image by image: <a, b> / |b|^2, and 0 where b is 0."""
    square = _dot(b, b)
    return jnp.where(square > 0, _dot(a, b) / jnp.where(square > 0, square, 1.0), 0.0)


def _dot(a: Images, b: Images) -> Float[Array, "b 1 1 1"]:
    return jnp.sum(a * b, axis=_PIXELS, keepdims=True)
