"""CFG-Zero*: guidance for flow models that are unsure of themselves.

Fan et al. 2025 (arXiv 2503.18886), section 4: the unconditional prediction u counts as s* u, the
multiple of it that is nearest to the conditional one c,

    s* = <c, u> / |u|^2,                                                           (1)

and no step is taken where the error of the model is greater than its prediction: the velocity of
the first steps is 0.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.process import FLOOR, Images, Prediction, from_x0_eps, to_x0_eps
from jaxdiff.errors import UserError
from jaxdiff.sampling.guidance.apg import along


@dataclass(frozen=True, kw_only=True)
class CFGZeroStar:
    """What of CFG-Zero* is done.

    Attributes:
      optimized_scale: whether u counts as s* u; of a model that predicts x0 the velocities do.
      zero_steps: how many steps at the start are not taken; the paper has 1 of 28, 2 of 50. One
        image still differs from another: by its noise.

    Raises:
      UserError: a negative number of steps.
    """

    optimized_scale: bool = True
    zero_steps: int = 1

    def __post_init__(self):
        if self.zero_steps < 0:
            raise UserError(f"CFGZeroStar.zero_steps is {self.zero_steps}: expected 0 or more.")

    def optimized(
        self,
        cond: Images,
        uncond: Images,
        x: Images,
        alpha: Float[Array, ""],
        sigma: Float[Array, ""],
        prediction: Prediction,
    ) -> Images:
        """The x0 that s* u stands for, u being what the network said where it said uncond."""
        if not self.optimized_scale:
            return uncond
        quantity: Prediction = "velocity" if prediction == "x0" else prediction

        def said(x0: Images) -> Images:
            # Where sigma is 0 nothing is left to say of eps, and eq. 1 is about nothing.
            eps = (x - alpha * x0) / jnp.maximum(sigma, FLOOR)
            return from_x0_eps(quantity, x0, eps, alpha, sigma)

        u = said(uncond)
        return to_x0_eps(quantity, along(said(cond), u) * u, x, alpha, sigma)[0]


def still(x: Images, alpha: Float[Array, ""], sigma: Float[Array, ""]) -> Images:
    """The x0 whose velocity is 0: the eps and x0 that x may be made of are then the same."""
    return x / (alpha + sigma)
