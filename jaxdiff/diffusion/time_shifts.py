"""Shifts of time toward noise that grow with the image: more tokens need more noise.

    t' = s / (s + 1 / t - 1),  s = e^mu or mu                                      (1)

(Esser et al. 2024, eq. 23). mu is a function of the number of image tokens that the network reads,
and in FLUX.2 also of the number of steps. diffusers calls (1) the exponential and the linear shift.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Positive
from jaxdiff.errors import UserError


@checked
@dataclass(frozen=True, kw_only=True)
class TokenShift:
    """mu is linear in the number of tokens: `base` at `base_tokens`, `most` at `most_tokens`.

    The defaults are those of FLUX.1 and Stable Diffusion 3.5: 256 tokens are 256x256 pixels, 4096
    are 1024x1024. Other numbers extrapolate.

    Raises:
        UserError: `most` is below `base`, or `most_tokens` is not above `base_tokens`; or the
            linear form gives few tokens a shift that is not positive.
    """

    base: Positive = 0.5
    most: Positive = 1.15
    base_tokens: Count = 256
    most_tokens: Count = 4096
    form: Literal["exponential", "linear"] = "exponential"

    def __post_init__(self):
        if self.most_tokens <= self.base_tokens or self.most < self.base:
            raise UserError(
                f"TokenShift got base={self.base} at base_tokens={self.base_tokens} and "
                f"most={self.most} at most_tokens={self.most_tokens}: expected base <= most and "
                "base_tokens < most_tokens."
            )
        if self.form == "linear" and self._mu(0) <= 0:
            raise UserError(
                f"TokenShift of base={self.base} is {self._mu(0):g} at 0 tokens: expected a "
                'positive shift for form="linear"; increase base.'
            )

    def _mu(self, num_tokens: int) -> float:
        slope = (self.most - self.base) / (self.most_tokens - self.base_tokens)
        return num_tokens * slope + (self.base - slope * self.base_tokens)

    def __call__(self, num_tokens: int) -> Float[Array, ""]:
        """s of eq. 1."""
        mu = jnp.asarray(self._mu(num_tokens), jnp.result_type(float))
        return jnp.exp(mu) if self.form == "exponential" else mu


@checked
@dataclass(frozen=True, kw_only=True)
class EmpiricalShift:
    """FLUX.2's s = e^mu: mu is linear in tokens at 10 and at 200 steps, and in the steps between.

    Above 4300 tokens it is that of 200 steps.
    """

    def __call__(self, num_tokens: int, num_steps: int | Int[Array, ""]) -> Float[Array, ""]:
        """s of eq. 1; num_steps may be traced."""
        at_10 = 8.73809524e-05 * num_tokens + 1.89833333
        at_200 = 0.00016927 * num_tokens + 0.45666666
        if num_tokens > 4300:
            at_10 = at_200
        slope = (at_200 - at_10) / 190
        steps = jnp.asarray(num_steps, jnp.result_type(float))
        return jnp.exp(slope * steps + (at_200 - 200 * slope))
