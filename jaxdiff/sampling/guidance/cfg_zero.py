"""CFG-Zero*: guidance for flow models in their early, inaccurate steps.

Fan et al. 2025 (arXiv 2503.18886), section 4. The unconditional prediction u is replaced by its
multiple s* u nearest to the conditional one c,

    s* = <c, u> / |u|^2,                                                           (1)

and the velocity of the first steps, where the model's error exceeds its prediction, is set to 0.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Natural
from jaxdiff.diffusion.process import FLOOR, Images, Prediction, from_x0_eps, to_x0_eps
from jaxdiff.sampling.guidance.apg import along


@checked
@dataclass(frozen=True, kw_only=True)
class CFGZeroStar:
    """The two parts of CFG-Zero*.

    Attributes:
      optimized_scale: replace u by s* u; for a model that predicts x0, in its velocity.
      zero_steps: number of initial steps with velocity 0: 1 of 28 or 2 of 50 in the paper.

    Raises:
      UserError: zero_steps is negative.
    """

    optimized_scale: bool = True
    zero_steps: Natural = 1

    def optimized(
        self,
        cond: Images,
        uncond: Images,
        x: Images,
        alpha: Float[Array, ""],
        sigma: Float[Array, ""],
        prediction: Prediction,
    ) -> Images:
        """Return the x0 of s* u, u being the network's prediction for `uncond`."""
        if not self.optimized_scale:
            return uncond
        quantity: Prediction = "velocity" if prediction == "x0" else prediction

        def prediction_of(x0: Images) -> Images:
            # At sigma = 0 nothing determines eps, and eq. 1 has no effect.
            eps = (x - alpha * x0) / jnp.maximum(sigma, FLOOR)
            return from_x0_eps(quantity, x0, eps, alpha, sigma)

        u = prediction_of(uncond)
        return to_x0_eps(quantity, along(prediction_of(cond), u) * u, x, alpha, sigma)[0]


def zero_velocity_x0(x: Images, alpha: Float[Array, ""], sigma: Float[Array, ""]) -> Images:
    """Return the x0 for which the velocity eps - x0 is 0."""
    return x / (alpha + sigma)
