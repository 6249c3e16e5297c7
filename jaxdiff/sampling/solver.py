"""The interface of solvers: one step along the path from noise to data.

The probability-flow ODE of x_t = alpha x0 + sigma eps, in terms of the denoiser D(x, t) = E[x0]:

    d(x / sigma) = D(x, t) d(alpha / sigma)                                        (1)

Between two times, with D held constant, x moves to

    x' = (sigma' / sigma) x + (alpha' - alpha sigma' / sigma) D                    (2)

which is DDIM (Song et al. 2021, eq. 12, eta = 0). It has no logarithm and no division by alpha, so
it holds at t = 1 where alpha may be 0 and into t = 0 where sigma' is 0. Solvers replace D by other
estimates. A stochastic solver applies (2) down to a fraction `kept` of sigma' and adds fresh noise
n,

    x' = [(2) with kept sigma' for sigma'] + sqrt(1 - kept^2) sigma' n             (3)

Solvers do not depend on the prediction type. A solver of your own is a frozen dataclass with the
two methods of `Solver`, passed as `Sampler(solver=...)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.diffusion.process import Images

Scalar = Float[Array, ""]
State = Any  # a denoiser's tree of arrays, carried from step to step; () for none
SolverState = Any  # likewise of a solver
Denoise = Callable[[Images, Scalar, State], tuple[Images, State]]  # (x_t, t, state) -> (x0, state)


@dataclass(frozen=True, kw_only=True)
class StatefulDenoiser:
    """A denoiser and its initial state.

    The sampling loop passes the state from step to step. All evaluations within a step use the
    state before the step, and the first one returns the next state.

    Attributes:
      denoise: (x_t, t, state) -> (x0, state).
      init_state: x -> the state before the first step.
    """

    denoise: Denoise
    init_state: Callable[[Images], State] = lambda x: ()


def stateless(denoise: Callable[[Images, Scalar], Images]) -> StatefulDenoiser:
    """Return a function (x_t, t) -> x0 as a denoiser without state."""
    return StatefulDenoiser(denoise=lambda x, t, state: (denoise(x, t), state))


def map_x0(
    denoiser: StatefulDenoiser, change: Callable[[Images, Scalar], Images]
) -> StatefulDenoiser:
    """Apply a function (x0, t) -> x0 to a denoiser's estimates."""

    def denoise(x: Images, t: Scalar, state: State) -> tuple[Images, State]:
        x0, state = denoiser.denoise(x, t, state)
        return change(x0, t), state

    return StatefulDenoiser(denoise=denoise, init_state=denoiser.init_state)


class Step(NamedTuple):
    """One interval of the time grid: time, alpha and sigma at both ends."""

    t: Scalar
    alpha: Scalar
    sigma: Scalar
    next_t: Scalar
    next_alpha: Scalar
    next_sigma: Scalar


class StepOutput(NamedTuple):
    """The result of one step.

    Attributes:
      x: x_t at the end of the step.
      x0: the denoiser's estimate at its beginning.
      solver_state: for the next step.
      state: the denoiser's, as the first evaluation returned it.
    """

    x: Images
    x0: Images
    solver_state: SolverState
    state: State


@runtime_checkable
class Solver(Protocol):
    """Interface of solvers: hashable, without state of their own."""

    def init(self, x: Images) -> SolverState:
        """Return the solver's state before the first step."""
        ...

    def step(
        self,
        denoise: Denoise,
        x: Images,
        solver_state: SolverState,
        state: State,
        s: Step,
        keys: Key[Array, " b"],
    ) -> StepOutput:
        """Move x from s.t to s.next_t.

        Args:
          denoise: (x_t, t, state) -> (x0, state), called any number of times with this `state`.
          x: x_t [b, h, w, c] at s.t.
          solver_state: from `init` or the last step.
          state: the denoiser's.
          s: the step.
          keys: random keys, one per image, new at each step.
        """
        ...


class OneStep:
    """Base of solvers without state."""

    def init(self, x: Images) -> SolverState:
        """Return no state."""
        return ()


def ddim_update(x: Images, x0: Images, s: Step) -> Images:
    """Apply eq. 2."""
    shrink = s.next_sigma / s.sigma
    return shrink * x + (s.next_alpha - s.alpha * shrink) * x0


def ddim_update_with_noise(
    x: Images, x0: Images, s: Step, kept: Scalar, fresh: Scalar, keys: Key[Array, " b"]
) -> Images:
    """Apply eq. 3, with fresh = sqrt(1 - kept^2), which the caller may compute more exactly."""
    down = ddim_update(x, x0, s._replace(next_sigma=kept * s.next_sigma))
    return down + fresh * s.next_sigma * noise_like(x, keys)


def noise_like(x: Images, keys: Key[Array, " b"]) -> Images:
    """Sample standard normal noise; that of an image depends on its key alone."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def noise_ratio(s: Step) -> Scalar:
    """(sigma' / alpha') / (sigma / alpha), e^-h of the papers; 0 from alpha = 0, into sigma = 0."""
    return s.alpha * s.next_sigma / (s.next_alpha * s.sigma)


def ancestral_update(x: Images, x0: Images, s: Step, eta: float, keys: Key[Array, " b"]) -> Images:
    """Apply eq. 3 with DDIM's noise, eta times that of the posterior q(x' | x, x0)."""
    if eta == 0:
        return ddim_update(x, x0, s)
    ratio = noise_ratio(s)
    fresh = eta * jnp.sqrt(jnp.maximum(1 - ratio**2, 0.0))
    kept = jnp.sqrt(1 - eta**2 + (eta * ratio) ** 2)
    return ddim_update_with_noise(x, x0, s, kept, fresh, keys)


class LastEstimate(NamedTuple):
    """State of a multistep solver: the last estimate of x0, and its log(alpha / sigma)."""

    x0: Images
    half_log_snr: Scalar  # -inf: there is none yet


def no_estimate(x: Images) -> LastEstimate:
    """Return the state before the first step."""
    return LastEstimate(x0=jnp.zeros_like(x), half_log_snr=jnp.full((), -jnp.inf, x.dtype))


def extrapolate(x0: Images, last: LastEstimate, s: Step) -> tuple[Images, LastEstimate]:
    """Extrapolate x0 to the middle of the step in log(alpha / sigma), and return the next state."""
    half_log_snr = jnp.log(s.alpha / s.sigma)
    h = jnp.log(s.next_alpha / s.next_sigma) - half_log_snr
    fraction = h / (2 * (half_log_snr - last.half_log_snr))
    fraction = jnp.where(jnp.isfinite(fraction), fraction, 0.0)
    return x0 + fraction * (x0 - last.x0), LastEstimate(x0, half_log_snr)
