"""Adaptive projected guidance: strong guidance without oversaturation.

Sadat et al. 2024 (arXiv 2410.02416), section 4, with d = cond - uncond in x0:

    m = d + momentum m_before                                                      (1)
    m' = m min(1, norm_threshold / |m|)                                            (2)
    guided = cond + (guidance_scale - 1) (m' - (1 - eta) <m', cond> / |cond|^2 cond)   (3)

The component of m' parallel to cond raises contrast and saturation more than prompt adherence.
Norms and products are over each image.
"""

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Fraction, Positive, Range
from jaxdiff.diffusion.process import Images

_PIXELS = (1, 2, 3)


@checked
@dataclass(frozen=True, kw_only=True)
class APG:
    """Settings of adaptive projected guidance; `APG(eta=1)` has no effect.

    Attributes:
      eta: weight of the parallel component, from 0 to 1.
      momentum: weight of earlier steps' differences, between -1 and 1; -0.75 to -0.5 in the paper.
      norm_threshold: largest norm of the difference; None for any. The norm grows with the square
        root of the number of values in an image: the paper uses 15 for Stable Diffusion XL.

    Raises:
      UserError: a number out of range.
    """

    eta: Fraction = 0.0
    momentum: Annotated[float, Range(-1, 1, "()")] = 0.0
    norm_threshold: Positive | None = None

    def project(self, difference: Images, cond: Images) -> Images:
        """Return the factor of (guidance_scale - 1) in eq. 3, given a difference m."""
        if self.norm_threshold is not None:
            length = jnp.sqrt(_dot(difference, difference))
            difference = difference * jnp.minimum(1.0, self.norm_threshold / length)
        if self.eta == 1:
            return difference
        return difference - (1 - self.eta) * along(difference, cond) * cond


def along(a: Images, b: Images) -> Float[Array, "b 1 1 1"]:
    """Return <a, b> / |b|^2 per image, and 0 where b is 0."""
    square = _dot(b, b)
    return jnp.where(square > 0, _dot(a, b) / jnp.where(square > 0, square, 1.0), 0.0)


def _dot(a: Images, b: Images) -> Float[Array, "b 1 1 1"]:
    return jnp.sum(a * b, axis=_PIXELS, keepdims=True)
