"""Stochastic solvers (eq. 3 of `solver`), and sampling of consistency models.

Over many steps, fresh noise corrects the denoiser's errors. The distribution is that of the ODE.
The noise of an image depends only on its keys.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Fraction, Positive
from jaxdiff.diffusion.process import Images
from jaxdiff.sampling.solver import (
    Denoise,
    OneStep,
    Scalar,
    SolverState,
    State,
    Step,
    StepOutput,
    ancestral_update,
    ddim_update,
    ddim_update_with_noise,
    extrapolate,
    no_estimate,
    noise_like,
    noise_ratio,
)
from jaxdiff.sampling.solvers_ode import DDIM


@checked
@dataclass(frozen=True, kw_only=True)
class DDPM(OneStep):
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, algorithm 2, eq. 6 and 7).

    x' is a sample of q(x' | x, x0) with the denoiser's x0, and the smaller of the paper's two
    variances ("fixed_small" in diffusers). `DDIM` with eta = 1 is the same (Song
    et al. 2021, section 4.1).
    """

    def step(
        self,
        denoise: Denoise,
        x: Images,
        solver_state: SolverState,
        state: State,
        s: Step,
        keys: Key[Array, " b"],
    ) -> StepOutput:
        """Sample the posterior."""
        x0, next_state = denoise(x, s.t, state)
        return StepOutput(ancestral_update(x, x0, s, 1.0, keys), x0, solver_state, next_state)


@checked
@dataclass(frozen=True, kw_only=True)
class EulerAncestral(DDIM):
    """Euler's step in sigma / alpha to less noise than the grid's, then fresh noise (k-diffusion).

    With sigma for sigma / alpha, sigma_up = eta sigma' sqrt(1 - (sigma' / sigma)^2) is added after
    a step down to sqrt(sigma'^2 - sigma_up^2). Multiplied by alpha' that is `DDIM` with this eta,
    whose default is 1.
    """

    eta: Fraction = 1.0


def _along_the_sde(x: Images, x0: Images, s: Step, eta: float, keys: Key[Array, " b"]) -> Images:
    """Apply eq. 3 with kept = e^(-eta h), exact for constant x0 (Lu et al. 2022b, eq. 3.5)."""
    if eta == 0:
        return ddim_update(x, x0, s)
    kept: Scalar = noise_ratio(s) ** eta
    return ddim_update_with_noise(x, x0, s, kept, jnp.sqrt(jnp.maximum(1 - kept**2, 0.0)), keys)


@checked
@dataclass(frozen=True, kw_only=True)
class DPMSolverPPSDE(OneStep):
    """First-order SDE-DPM-Solver++ (Lu et al. 2022b, section 5), one evaluation per step.

    Solves the reverse SDE with eta^2 of the usual noise exactly for a constant x0.
    At eta = 1 that is `DDPM`, at eta = 0 `Euler`.

    Raises:
        UserError: eta outside [0, 1].
    """

    eta: Fraction = 1.0

    def step(
        self,
        denoise: Denoise,
        x: Images,
        solver_state: SolverState,
        state: State,
        s: Step,
        keys: Key[Array, " b"],
    ) -> StepOutput:
        """Apply eq. 3 with kept = e^(-eta h)."""
        x0, next_state = denoise(x, s.t, state)
        return StepOutput(_along_the_sde(x, x0, s, self.eta, keys), x0, solver_state, next_state)


@checked
@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2MSDE(DPMSolverPPSDE):
    """Second-order multistep SDE-DPM-Solver++ (Lu et al. 2022b, section 5), one evaluation.

    `DPMSolverPP2M`'s extrapolated x0 in the step of `DPMSolverPPSDE`; at eta = 0 it is the former.
    """

    def init(self, x: Images) -> SolverState:
        """Return the state without an estimate."""
        return no_estimate(x)

    def step(
        self,
        denoise: Denoise,
        x: Images,
        solver_state: SolverState,
        state: State,
        s: Step,
        keys: Key[Array, " b"],
    ) -> StepOutput:
        """Apply eq. 3 with kept = e^(-eta h) and x0 of the middle of the step."""
        x0, next_state = denoise(x, s.t, state)
        ahead, solver_state = extrapolate(x0, solver_state, s)
        return StepOutput(_along_the_sde(x, ahead, s, self.eta, keys), x0, solver_state, next_state)


@checked
@dataclass(frozen=True, kw_only=True)
class LCM(OneStep):
    """Multistep sampling of a consistency model (Luo et al. 2023, algorithm 3).

    For networks distilled to jump from any x_t to the end of its path:
    f = c_skip x + c_out x0, c_skip = d^2 / ((c t)^2 + d^2) and c_out = c t / sqrt((c t)^2 + d^2),
    so that f(x, 0) = x (Song et al. 2023, eq. 5); then x' = alpha' f + sigma' n.

    Attributes:
        sigma_data: d.
        time_scale: c. diffusers multiplies its 1000 training steps by 10.

    Raises:
        UserError: either is not positive.
    """

    sigma_data: Positive = 0.5
    time_scale: Positive = 10_000.0

    def step(
        self,
        denoise: Denoise,
        x: Images,
        solver_state: SolverState,
        state: State,
        s: Step,
        keys: Key[Array, " b"],
    ) -> StepOutput:
        """Jump to the end of the path, then add the noise of the next time."""
        x0, next_state = denoise(x, s.t, state)
        scaled = self.time_scale * s.t
        square = scaled**2 + self.sigma_data**2
        end = self.sigma_data**2 / square * x + scaled / jnp.sqrt(square) * x0
        return StepOutput(
            s.next_alpha * end + s.next_sigma * noise_like(x, keys), x0, solver_state, next_state
        )
