"""Solvers of the probability-flow ODE; `DDIM`'s eta and `Heun`'s churn add noise.

Equation numbers are those of `solver`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Fraction, NotNegative, Range
from jaxdiff.diffusion.process import Images
from jaxdiff.diffusion.schedules import AnySchedule
from jaxdiff.sampling.solver import (
    Denoise,
    OneStep,
    SolverState,
    State,
    Step,
    StepOutput,
    ancestral_update,
    ddim_update,
    extrapolate,
    no_estimate,
    noise_like,
)


@checked
@dataclass(frozen=True, kw_only=True)
class DDIM(OneStep):
    """Song et al. 2021, eq. 12 and 16, first order; eta = 0 is the ODE, eta = 1 is ancestral.

    Eq. 16 is written for schedules of any norm: its 1 - alpha_t / alpha_{t-1}, over its
    1 - alpha_t, is 1 - `noise_ratio`^2 here.

    Raises:
        UserError: eta outside [0, 1].
    """

    eta: Fraction = 0.0

    def step(
        self,
        denoise: Denoise,
        x: Images,
        solver_state: SolverState,
        state: State,
        s: Step,
        keys: Key[Array, " b"],
    ) -> StepOutput:
        """Apply eq. 3 with eta sqrt(1 - ratio^2) of fresh noise."""
        x0, next_state = denoise(x, s.t, state)
        return StepOutput(ancestral_update(x, x0, s, self.eta, keys), x0, solver_state, next_state)


@checked
@dataclass(frozen=True, kw_only=True)
class Euler(OneStep):
    """Euler's method on the straightened path: first order, one evaluation per step.

    z = x / (alpha + sigma) against tau = sigma / (alpha + sigma) is a rectified flow whatever the
    schedule, and dz / d tau = eps - x0 there. Since eq. 2 keeps its form under such a rescaling,
    this is also Euler's method in sigma / alpha (Karras et al. 2022, eq. 4), and DDIM at eta = 0.
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
        """Apply eq. 2."""
        x0, next_state = denoise(x, s.t, state)
        return StepOutput(ddim_update(x, x0, s), x0, solver_state, next_state)


@checked
@dataclass(frozen=True, kw_only=True)
class Churn:
    """Fresh noise before each step of `Heun` (Karras et al. 2022, algorithm 2, lines 4 to 6).

    Attributes:
        schedule: the model's, which maps the raised noise to a time.
        gamma: relative increase of sigma / alpha: S_churn / num_steps of the paper, which limits it
            to sqrt(2) - 1.
        s_tmin: the smallest sigma / alpha that is raised.
        s_tmax: the largest.
        s_noise: standard deviation of the added noise; above 1 it counteracts loss of detail.

    Raises:
        UserError: gamma outside [0, sqrt(2) - 1].
    """

    schedule: AnySchedule
    gamma: Annotated[float, Range(0, 0.4143)] = 0.1
    s_tmin: NotNegative = 0.0
    s_tmax: Annotated[float, Range(0, math.inf)] = float("inf")
    s_noise: NotNegative = 1.0

    def apply(self, x: Images, s: Step, keys: Key[Array, " b"]) -> tuple[Images, Step]:
        """Return x with more noise, and the step from there; no time is later than 1."""
        noise_to_data = s.sigma / s.alpha
        acts = (noise_to_data >= self.s_tmin) & (noise_to_data <= self.s_tmax) & (s.alpha > 0)
        t = self.schedule.time_at((1 + self.gamma) * noise_to_data)
        t = jnp.where(acts, jnp.maximum(t, s.t), s.t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        shrink = jnp.where(acts, alpha / s.alpha, 1.0)
        fresh = jnp.sqrt(jnp.maximum(sigma**2 - (shrink * s.sigma) ** 2, 0.0))
        churned = shrink * x + jnp.where(acts, self.s_noise * fresh, 0.0) * noise_like(x, keys)
        return churned, s._replace(t=t, alpha=alpha, sigma=sigma)


@checked
@dataclass(frozen=True, kw_only=True)
class Heun(OneStep):
    """Heun's method: two evaluations, second order (Karras et al. 2022, algorithm 1).

    As in the paper, the step into sigma = 0 is Euler's and evaluates once.

    Attributes:
        variable: variable of integration. "straight" is tau = sigma / (alpha + sigma) of `Euler`,
            which stays finite where alpha is 0; "sigma" is sigma / alpha, the paper's and
            diffusers', in which the step from alpha = 0 is Euler's too.
        churn: noise added before each step (algorithm 2); None solves the ODE.
    """

    variable: Literal["straight", "sigma"] = "straight"
    churn: Churn | None = None

    def step(
        self,
        denoise: Denoise,
        x: Images,
        solver_state: SolverState,
        state: State,
        s: Step,
        keys: Key[Array, " b"],
    ) -> StepOutput:
        """Take Euler's step, then correct it by the mean of the slopes at both ends."""
        if self.churn is not None and self.churn.gamma > 0:
            x, s = self.churn.apply(x, s, keys)
        in_sigma = self.variable == "sigma"
        total = s.alpha if in_sigma else s.alpha + s.sigma
        next_total = s.next_alpha if in_sigma else s.next_alpha + s.next_sigma
        x0, next_state = denoise(x, s.t, state)
        euler = ddim_update(x, x0, s)

        def correct() -> Images:
            # z = x / total has slope (z - x0) / tau against tau = sigma / total, either way.
            tau, next_tau = s.sigma / total, s.next_sigma / next_total
            slope = (x / total - x0) / tau
            next_slope = (euler / next_total - denoise(euler, s.next_t, state)[0]) / next_tau
            z = x / total + (next_tau - tau) * (slope + next_slope) / 2
            return z * next_total

        is_inside = (s.next_sigma > 0) & (total > 0)
        return StepOutput(
            jax.lax.cond(is_inside, correct, lambda: euler), x0, solver_state, next_state
        )


@checked
@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M:
    """Second-order multistep DPM-Solver++ (Lu et al. 2022b, algorithm 2), one evaluation per step.

    D is extrapolated from this estimate of x0 and the last one to the middle of the step, in
    lambda = log(alpha / sigma). Steps from or to an infinite lambda, and the first, are of first
    order. Second order requires steps that are short in lambda. The last steps of a uniform grid
    into sigma = 0 are not: the error falls as h^2 log(1 / h) (slopes of 1.3 to 1.8 from 80 to 640
    steps), which `TimeGrid(rho=1.5)` compensates.
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
        """Apply eq. 2 with D = x0 + (x0 - last x0) / (2 r), r = (lambda - last lambda) / h."""
        x0, next_state = denoise(x, s.t, state)
        ahead, solver_state = extrapolate(x0, solver_state, s)
        return StepOutput(ddim_update(x, ahead, s), x0, solver_state, next_state)


class LastNoises(NamedTuple):
    """State of `PLMS`: the last estimates of eps, newest first."""

    eps: tuple[Images, Images, Images]
    count: Int[Array, ""]


# Weights of the newest four estimates after 0, 1, 2 and 3 or more earlier ones, eq. 9 and 12.
_ADAMS_BASHFORTH = np.array(
    [
        [1, 0, 0, 0],
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ]
)


@checked
@dataclass(frozen=True, kw_only=True)
class PLMS:
    """Pseudo linear multistep (Liu et al. 2022, PNDM, section 3.3): eq. 2 with eps extrapolated.

    Adams-Bashforth's weights of the last four estimates of eps. The first step is Heun's in eps
    and evaluates twice; at alpha = 0, where eps does not determine x0, eq. 2 precedes it. Stable
    Diffusion 1.x was published with this solver.
    """

    def init(self, x: Images) -> SolverState:
        """Return the state without an estimate."""
        none = jnp.zeros_like(x)
        return LastNoises((none, none, none), jnp.zeros((), jnp.int32))

    def step(
        self,
        denoise: Denoise,
        x: Images,
        solver_state: SolverState,
        state: State,
        s: Step,
        keys: Key[Array, " b"],
    ) -> StepOutput:
        """Apply eq. 2 with the weighted mean of this and the last estimates of eps."""
        x0, next_state = denoise(x, s.t, state)
        eps = (x - s.alpha * x0) / s.sigma
        weights = jnp.asarray(_ADAMS_BASHFORTH, x.dtype)[jnp.minimum(solver_state.count, 3)]
        known = (eps, *solver_state.eps)
        ahead = sum(weight * e for weight, e in zip(weights, known, strict=True))

        def first() -> Images:
            there = ddim_update(x, x0, s)
            next_x0, _ = denoise(there, s.next_t, state)
            return (eps + (there - s.next_alpha * next_x0) / s.next_sigma) / 2

        is_known = s.alpha > 0
        is_first = (solver_state.count == 0) & (s.next_sigma > 0) & is_known
        eps_bar = jax.lax.cond(is_first, first, lambda: ahead)
        multistep = s.next_alpha / s.alpha * (x - s.sigma * eps_bar) + s.next_sigma * eps_bar
        newest, second, _ = solver_state.eps
        next_solver_state = LastNoises((eps, newest, second), solver_state.count + is_known)
        return StepOutput(
            jnp.where(is_known, multistep, ddim_update(x, x0, s)), x0, next_solver_state, next_state
        )
