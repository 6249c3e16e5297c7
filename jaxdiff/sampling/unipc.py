"""UniPC: a multistep predictor and, from the same evaluation, a corrector.

Zhao et al. 2023, section 3, for p = 2 and the denoiser ("data prediction", appendix A). With
lambda = log(alpha / sigma), h its step, D and D_1 the estimates where this step and the last began,

    x' = [eq. 2 of `solver` with D] + alpha' B rho (D_1 - D) / r_1                        UniP-2
    x' = [the same] + alpha' (c_1 (D_1 - D) / r_1 + c_2 (D' - D))                          UniC-2

r_1 = (lambda_1 - lambda) / h < 0, B = h ("bh1") or 1 - e^-h ("bh2"), rho = 1 / 2, and c solves
c_1 + c_2 = -phi_1, r_1 c_1 + c_2 = -2 phi_2, where

    phi_k = sum_{j >= 1} (-h)^j / (j + k)!,                                                    (1)

with which both are exact for a D that is linear in lambda. D' is the first evaluation of the next
step, so the corrector costs none.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from jaxdiff.config.checked import checked
from jaxdiff.diffusion.process import Images
from jaxdiff.sampling.solver import (
    Denoise,
    Scalar,
    SolverState,
    State,
    Step,
    StepOutput,
    ddim_update,
)


class LastStep(NamedTuple):
    """State of `UniPC`: the last step."""

    x0: Images  # the estimate at its beginning
    earlier_x0: Images  # that of the step before it
    added: Images  # the predictor's addition to eq. 2
    h: Scalar
    slope: Scalar  # 1 / r_1, or 0: the step was of first order
    is_known: Bool[Array, ""]


@checked
@dataclass(frozen=True, kw_only=True)
class UniPC:
    """UniPC-2, one evaluation per step, third order while steps are short in lambda.

    Steps from or to an infinite lambda, and the first, are of first order, with a corrector of the
    second. Use it for few steps, 5 to 15.

    Attributes:
        variant: B(h) of UniP: "bh2" for guided sampling, "bh1" for unconditional.
    """

    variant: Literal["bh1", "bh2"] = "bh2"

    def init(self, x: Images) -> SolverState:
        """Return the state without a step."""
        none, one = jnp.zeros_like(x), jnp.ones((), x.dtype)
        return LastStep(none, none, none, jnp.inf * one, 0 * one, jnp.zeros((), bool))

    def step(
        self,
        denoise: Denoise,
        x: Images,
        solver_state: SolverState,
        state: State,
        s: Step,
        keys: Key[Array, " b"],
    ) -> StepOutput:
        """Correct the last step's result, then predict."""
        x0, next_state = denoise(x, s.t, state)
        x = jnp.where(solver_state.is_known, x + self._correction(solver_state, x0, s.alpha), x)
        h = jnp.log(s.next_alpha / s.next_sigma) - jnp.log(s.alpha / s.sigma)
        slope = -h / solver_state.h
        slope = jnp.where(jnp.isfinite(slope), slope, 0.0)
        added = s.next_alpha * self._width(h) / 2 * slope * (solver_state.x0 - x0)
        next_solver_state = LastStep(x0, solver_state.x0, added, h, slope, jnp.ones((), bool))
        return StepOutput(ddim_update(x, x0, s) + added, x0, next_solver_state, next_state)

    def _width(self, h: Scalar) -> Scalar:
        """Return B(h); that of "bh2" for an infinite step."""
        bh2 = -jnp.expm1(-h)
        return bh2 if self.variant == "bh2" else jnp.where(jnp.isfinite(h), h, bh2)

    def _correction(self, last: LastStep, next_x0: Images, next_alpha: Scalar) -> Images:
        """Return the corrector's addition to the predictor's result."""
        phi_1, phi_2 = _phi(last.h)
        c_1 = (2 * phi_2 - phi_1) * last.slope / (last.slope - 1)
        c_2 = jnp.where(last.slope == 0, self._width(last.h) / 2, -phi_1 - c_1)
        behind = c_1 * last.slope * (last.earlier_x0 - last.x0)
        return next_alpha * (behind + c_2 * (next_x0 - last.x0)) - last.added


def _phi(h: Scalar) -> tuple[Scalar, Scalar]:
    """Evaluate eq. 1 for k = 1 and 2: as a series for small h, where the closed form cancels."""
    small = jnp.minimum(h, 0.2)
    series = [sum((-small) ** j / math.factorial(j + k) for j in range(1, 9)) for k in (1, 2)]
    large = jnp.maximum(h, 0.2)
    phi_1 = -jnp.expm1(-large) / large - 1
    phi_2 = -phi_1 / large - 0.5
    return jnp.where(h < 0.2, series[0], phi_1), jnp.where(h < 0.2, series[1], phi_2)
