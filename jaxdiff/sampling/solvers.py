"""Solvers: each is a step along the path from noise to data.

The probability-flow ODE of x_t = alpha x0 + sigma eps, in terms of the denoiser D(x, t) = E[x0]:

    d(x / sigma) = D(x, t) d(alpha / sigma)                                        (1)

Between two times, with D held, x moves to

    x' = (sigma' / sigma) x + (alpha' - alpha sigma' / sigma) D                    (2)

which is DDIM (Song et al. 2021, eq. 12, eta = 0). No logarithm and no division by alpha is in it,
so it holds at t = 1 where alpha may be 0 and into t = 0 where sigma' is 0. The solvers differ in
what they put in the place of D. Nothing is said here of what a network predicts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxdiff.diffusion.process import Images
from jaxdiff.errors import UserError

Scalar = Float[Array, ""]
Denoise = Callable[[Images, Scalar], Images]  # (x_t, t) -> x0
Memory = Any  # a tree of arrays that a solver carries from step to step


class Step(NamedTuple):
    """One interval of the time grid, with what a solver needs to know of both its ends."""

    t: Scalar
    alpha: Scalar
    sigma: Scalar
    next_t: Scalar
    next_alpha: Scalar
    next_sigma: Scalar


class Stepped(NamedTuple):
    """Where a step arrives."""

    x: Images
    x0: Images  # what the denoiser said before the step
    memory: Memory


@runtime_checkable
class Solver(Protocol):
    """What the sampling loop asks of a solver."""

    def init(self, x: Images) -> Memory:
        """What there is to remember before the first step."""
        ...

    def step(
        self, denoise: Denoise, x: Images, memory: Memory, s: Step, keys: Key[Array, " b"]
    ) -> Stepped:
        """Moves x from s.t to s.next_t; keys are one for each image and new at each step."""
        ...


def _advance(x: Images, x0: Images, s: Step) -> Images:
    """Eq. 2."""
    shrink = s.next_sigma / s.sigma
    return shrink * x + (s.next_alpha - s.alpha * shrink) * x0


@dataclass(frozen=True, kw_only=True)
class DDIM:
    """Song et al. 2021, eq. 12 and 16, first order; eta = 0 is the ODE, eta = 1 is ancestral.

    Eq. 16 is written for schedules of any norm: its 1 - alpha_t / alpha_{t-1} is
    sigma^2 - (alpha sigma' / alpha')^2 here.

    Raises:
        UserError: eta outside [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise UserError(f"DDIM.eta is {self.eta}; give a number from 0 (no noise) to 1.")

    def init(self, x: Images) -> Memory:
        """Nothing."""
        return ()

    def step(
        self, denoise: Denoise, x: Images, memory: Memory, s: Step, keys: Key[Array, " b"]
    ) -> Stepped:
        """Down by eq. 2 to less noise than asked, then fresh noise up to what is asked."""
        x0 = denoise(x, s.t)
        if self.eta == 0:
            return Stepped(_advance(x, x0, s), x0, memory)
        kept = s.alpha * s.next_sigma / s.next_alpha
        fresh = self.eta * s.next_sigma / s.sigma * jnp.sqrt(jnp.maximum(s.sigma**2 - kept**2, 0.0))
        remaining = jnp.sqrt(jnp.maximum(s.next_sigma**2 - fresh**2, 0.0))
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
        down = _advance(x, x0, s._replace(next_sigma=remaining))
        return Stepped(down + fresh * noise, x0, memory)


@dataclass(frozen=True, kw_only=True)
class Euler:
    """Euler's method on the straightened path, one evaluation, first order.

    z = x / (alpha + sigma) against tau = sigma / (alpha + sigma) is a rectified flow whatever the
    schedule, and dz / d tau = eps - x0 there. Since eq. 2 keeps its form under such a rescaling,
    this is also Euler's method in sigma / alpha (Karras et al. 2022, eq. 4), and DDIM at eta = 0.
    """

    def init(self, x: Images) -> Memory:
        """Nothing."""
        return ()

    def step(
        self, denoise: Denoise, x: Images, memory: Memory, s: Step, keys: Key[Array, " b"]
    ) -> Stepped:
        """Eq. 2."""
        x0 = denoise(x, s.t)
        return Stepped(_advance(x, x0, s), x0, memory)


@dataclass(frozen=True, kw_only=True)
class Heun:
    """Heun's method on the straightened path of `Euler`: two evaluations, second order.

    Karras et al. 2022, algorithm 1, but in tau = sigma / (alpha + sigma), which stays finite where
    alpha is 0. As there, the step into sigma = 0 is Euler's and evaluates once.
    """

    def init(self, x: Images) -> Memory:
        """Nothing."""
        return ()

    def step(
        self, denoise: Denoise, x: Images, memory: Memory, s: Step, keys: Key[Array, " b"]
    ) -> Stepped:
        """Euler's step, then the mean of the velocities at both its ends."""
        total, next_total = s.alpha + s.sigma, s.next_alpha + s.next_sigma
        tau, next_tau = s.sigma / total, s.next_sigma / next_total
        x0 = denoise(x, s.t)
        euler = _advance(x, x0, s)

        def correct() -> Images:
            velocity = (x / total - x0) / tau
            next_velocity = (euler / next_total - denoise(euler, s.next_t)) / next_tau
            z = x / total + (next_tau - tau) * (velocity + next_velocity) / 2
            return z * next_total

        return Stepped(jax.lax.cond(s.next_sigma > 0, correct, lambda: euler), x0, memory)


class LastEstimate(NamedTuple):
    """What a multistep solver remembers of the step before."""

    x0: Images
    half_log_snr: Scalar  # -inf: there is none


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M:
    """Second-order multistep DPM-Solver++ (Lu et al. 2022b, algorithm 2), one evaluation a step.

    D is extrapolated from this estimate of x0 and the last one to the middle of the step, in
    lambda = log(alpha / sigma). Steps from or to an infinite lambda, and the first, are of first
    order. Order 2 takes steps that are short in lambda: over an even grid all the way into
    sigma = 0, where the last ones are not, the error falls as h^2 log(1 / h) instead (slopes of
    1.3 to 1.8 from 80 to 640 steps), and `TimeGrid(rho=1.5)` makes up for it.
    """

    def init(self, x: Images) -> Memory:
        """No estimate yet."""
        return LastEstimate(x0=jnp.zeros_like(x), half_log_snr=jnp.full((), -jnp.inf, x.dtype))

    def step(
        self, denoise: Denoise, x: Images, memory: Memory, s: Step, keys: Key[Array, " b"]
    ) -> Stepped:
        """Eq. 2 with D = x0 + (x0 - last x0) / (2 r), r = (lambda - last lambda) / h."""
        x0 = denoise(x, s.t)
        half_log_snr = jnp.log(s.alpha / s.sigma)
        h = jnp.log(s.next_alpha / s.next_sigma) - half_log_snr
        ahead = h / (2 * (half_log_snr - memory.half_log_snr))
        ahead = jnp.where(jnp.isfinite(ahead), ahead, 0.0)
        extrapolated = x0 + ahead * (x0 - memory.x0)
        return Stepped(_advance(x, extrapolated, s), x0, LastEstimate(x0, half_log_snr))


class LastNoises(NamedTuple):
    """What `PLMS` remembers: the estimates of eps before this one, newest first."""

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


@dataclass(frozen=True, kw_only=True)
class PLMS:
    """Pseudo linear multistep (Liu et al. 2022, PNDM, section 3.3): eq. 2 with eps extrapolated.

    Adams-Bashforth's weights of the last four estimates of eps. The first step is Heun's in eps
    and evaluates twice. It is what Stable Diffusion 1.x was published with.
    """

    def init(self, x: Images) -> Memory:
        """No estimate yet."""
        none = jnp.zeros_like(x)
        return LastNoises((none, none, none), jnp.zeros((), jnp.int32))

    def step(
        self, denoise: Denoise, x: Images, memory: Memory, s: Step, keys: Key[Array, " b"]
    ) -> Stepped:
        """Down by eq. 2 with what this and the last estimates of eps say together."""
        x0 = denoise(x, s.t)
        eps = (x - s.alpha * x0) / s.sigma
        weights = jnp.asarray(_ADAMS_BASHFORTH, x.dtype)[jnp.minimum(memory.count, 3)]
        known = (eps, *memory.eps)
        extrapolated = sum(weight * e for weight, e in zip(weights, known, strict=True))

        def first() -> Images:
            ahead = self._advance(x, eps, s)
            next_x0 = denoise(ahead, s.next_t)
            return (eps + (ahead - s.next_alpha * next_x0) / s.next_sigma) / 2

        is_first = (memory.count == 0) & (s.next_sigma > 0)
        eps_bar = jax.lax.cond(is_first, first, lambda: extrapolated)
        newest, second, _ = memory.eps
        remembered = LastNoises((eps, newest, second), memory.count + 1)
        return Stepped(self._advance(x, eps_bar, s), x0, remembered)

    def _advance(self, x: Images, eps: Images, s: Step) -> Images:
        """Eq. 2 in terms of eps; not for alpha = 0, where eps says nothing of x0."""
        return s.next_alpha / s.alpha * (x - s.sigma * eps) + s.next_sigma * eps
