"""Solvers: each is a step along the path from noise to data.

The probability-flow ODE of x_t = alpha x0 + sigma eps, in terms of the denoiser D(x, t) = E[x0]:

    d(x / sigma) = D(x, t) d(alpha / sigma)                                        (1)

Between two times, with D held, x moves to

    x' = (sigma' / sigma) x + (alpha' - alpha sigma' / sigma) D                    (2)

which is DDIM (Song et al. 2021, eq. 12, eta = 0). No logarithm and no division by alpha is in it,
so it holds at t = 1 where alpha may be 0 and into t = 0 where sigma' is 0. The solvers differ in
what they put in the place of D. A stochastic one goes down by (2) to a share `kept` of sigma' and
makes up for the rest with fresh noise n,

    x' = [(2) with kept sigma' for sigma'] + sqrt(1 - kept^2) sigma' n             (3)

Nothing is said here of what a network predicts. `stochastic` and `unipc` hold further solvers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxdiff.diffusion.process import Images
from jaxdiff.diffusion.schedules import AnySchedule
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


def advance(x: Images, x0: Images, s: Step) -> Images:
    """Eq. 2."""
    shrink = s.next_sigma / s.sigma
    return shrink * x + (s.next_alpha - s.alpha * shrink) * x0


def advance_with_noise(
    x: Images, x0: Images, s: Step, kept: Scalar, fresh: Scalar, keys: Key[Array, " b"]
) -> Images:
    """Eq. 3, with fresh = sqrt(1 - kept^2), which the caller may know more exactly."""
    down = advance(x, x0, s._replace(next_sigma=kept * s.next_sigma))
    return down + fresh * s.next_sigma * noise_like(x, keys)


def noise_like(x: Images, keys: Key[Array, " b"]) -> Images:
    """Standard normal noise; that of an image depends on its key alone."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def noise_ratio(s: Step) -> Scalar:
    """(sigma' / alpha') / (sigma / alpha), e^-h of the papers; 0 from alpha = 0, into sigma = 0."""
    return s.alpha * s.next_sigma / (s.next_alpha * s.sigma)


@dataclass(frozen=True, kw_only=True)
class DDIM:
    """Song et al. 2021, eq. 12 and 16, first order; eta = 0 is the ODE, eta = 1 is ancestral.

    Eq. 16 is written for schedules of any norm: its 1 - alpha_t / alpha_{t-1}, over its
    1 - alpha_t, is 1 - `noise_ratio`^2 here.

    Raises:
        UserError: eta outside [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self):
        check_eta(self)

    def init(self, x: Images) -> Memory:
        """Nothing."""
        return ()

    def step(
        self, denoise: Denoise, x: Images, memory: Memory, s: Step, keys: Key[Array, " b"]
    ) -> Stepped:
        """Eq. 3 with eta sqrt(1 - ratio^2) of fresh noise."""
        x0 = denoise(x, s.t)
        return Stepped(ancestral(x, x0, s, self.eta, keys), x0, memory)


def ancestral(x: Images, x0: Images, s: Step, eta: float, keys: Key[Array, " b"]) -> Images:
    """Eq. 3 with DDIM's noise, eta times that of the posterior q(x' | x, x0)."""
    if eta == 0:
        return advance(x, x0, s)
    ratio = noise_ratio(s)
    fresh = eta * jnp.sqrt(jnp.maximum(1 - ratio**2, 0.0))
    kept = jnp.sqrt(1 - eta**2 + (eta * ratio) ** 2)
    return advance_with_noise(x, x0, s, kept, fresh, keys)


def check_eta(solver: Any) -> None:
    """Raises `UserError` for an eta outside [0, 1]."""
    if not 0 <= solver.eta <= 1:
        raise UserError(
            f"{type(solver).__name__}.eta is {solver.eta}; give a number from 0 (no noise) to 1."
        )


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
        return Stepped(advance(x, x0, s), x0, memory)


@dataclass(frozen=True, kw_only=True)
class Churn:
    """Fresh noise before each step of `Heun` (Karras et al. 2022, algorithm 2, lines 4 to 6).

    Attributes:
        schedule: the model's own, which says at what time there is the raised noise.
        gamma: how much sigma / alpha is raised by, S_churn / num_steps of the paper, which takes
            no more than sqrt(2) - 1.
        low: S_tmin, the least sigma / alpha that is raised.
        high: S_tmax, the most.
        noise: S_noise, standard deviation of what is added, above 1 where detail is lost.

    Raises:
        UserError: gamma outside [0, sqrt(2) - 1].
    """

    schedule: AnySchedule
    gamma: float = 0.1
    low: float = 0.0
    high: float = float("inf")
    noise: float = 1.0

    def __post_init__(self):
        if not 0 <= self.gamma <= 0.4143:
            raise UserError(
                f"Churn.gamma is {self.gamma}; give S_churn / num_steps, from 0 to 0.4142."
            )

    def apply(self, x: Images, s: Step, keys: Key[Array, " b"]) -> tuple[Images, Step]:
        """x with more noise, and the step from there. No time is later than 1."""
        noise_to_data = s.sigma / s.alpha
        acts = (noise_to_data >= self.low) & (noise_to_data <= self.high) & (s.alpha > 0)
        t = self.schedule.time_at((1 + self.gamma) * noise_to_data)
        t = jnp.where(acts, jnp.maximum(t, s.t), s.t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        shrink = jnp.where(acts, alpha / s.alpha, 1.0)
        fresh = jnp.sqrt(jnp.maximum(sigma**2 - (shrink * s.sigma) ** 2, 0.0))
        churned = shrink * x + jnp.where(acts, self.noise * fresh, 0.0) * noise_like(x, keys)
        return churned, s._replace(t=t, alpha=alpha, sigma=sigma)


@dataclass(frozen=True, kw_only=True)
class Heun:
    """Heun's method: two evaluations, second order (Karras et al. 2022, algorithm 1).

    As there, the step into sigma = 0 is Euler's and evaluates once.

    Attributes:
        variable: what steps are taken in. "straight" is tau = sigma / (alpha + sigma) of `Euler`,
            which stays finite where alpha is 0; "sigma" is sigma / alpha, the paper's own and
            diffusers', in which the step from alpha = 0 is Euler's too.
        churn: noise added before each step (algorithm 2); none is the ODE.
    """

    variable: Literal["straight", "sigma"] = "straight"
    churn: Churn | None = None

    def init(self, x: Images) -> Memory:
        """Nothing."""
        return ()

    def step(
        self, denoise: Denoise, x: Images, memory: Memory, s: Step, keys: Key[Array, " b"]
    ) -> Stepped:
        """Euler's step, then the mean of the slopes at both its ends."""
        if self.churn is not None and self.churn.gamma > 0:
            x, s = self.churn.apply(x, s, keys)
        in_sigma = self.variable == "sigma"
        total = s.alpha if in_sigma else s.alpha + s.sigma
        next_total = s.next_alpha if in_sigma else s.next_alpha + s.next_sigma
        x0 = denoise(x, s.t)
        euler = advance(x, x0, s)

        def correct() -> Images:
            # z = x / total has slope (z - x0) / tau against tau = sigma / total, either way.
            tau, next_tau = s.sigma / total, s.next_sigma / next_total
            slope = (x / total - x0) / tau
            next_slope = (euler / next_total - denoise(euler, s.next_t)) / next_tau
            z = x / total + (next_tau - tau) * (slope + next_slope) / 2
            return z * next_total

        is_inside = (s.next_sigma > 0) & (total > 0)
        return Stepped(jax.lax.cond(is_inside, correct, lambda: euler), x0, memory)


class LastEstimate(NamedTuple):
    """What a multistep solver remembers of the step before."""

    x0: Images
    half_log_snr: Scalar  # -inf: there is none


def no_estimate(x: Images) -> LastEstimate:
    """What there is to remember before the first step."""
    return LastEstimate(x0=jnp.zeros_like(x), half_log_snr=jnp.full((), -jnp.inf, x.dtype))


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
        return no_estimate(x)

    def step(
        self, denoise: Denoise, x: Images, memory: Memory, s: Step, keys: Key[Array, " b"]
    ) -> Stepped:
        """Eq. 2 with D = x0 + (x0 - last x0) / (2 r), r = (lambda - last lambda) / h."""
        x0 = denoise(x, s.t)
        ahead, memory = extrapolated(x0, memory, s)
        return Stepped(advance(x, ahead, s), x0, memory)


def extrapolated(x0: Images, last: LastEstimate, s: Step) -> tuple[Images, LastEstimate]:
    """x0 in the middle of the step, in lambda, and what to remember of this one."""
    half_log_snr = jnp.log(s.alpha / s.sigma)
    h = jnp.log(s.next_alpha / s.next_sigma) - half_log_snr
    share = h / (2 * (half_log_snr - last.half_log_snr))
    share = jnp.where(jnp.isfinite(share), share, 0.0)
    return x0 + share * (x0 - last.x0), LastEstimate(x0, half_log_snr)


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
    and evaluates twice; at alpha = 0, where eps says nothing of x0, eq. 2 as it is comes before it.
    It is what Stable Diffusion 1.x was published with.
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
        ahead = sum(weight * e for weight, e in zip(weights, known, strict=True))

        def first() -> Images:
            there = advance(x, x0, s)
            next_x0 = denoise(there, s.next_t)
            return (eps + (there - s.next_alpha * next_x0) / s.next_sigma) / 2

        is_known = s.alpha > 0
        is_first = (memory.count == 0) & (s.next_sigma > 0) & is_known
        eps_bar = jax.lax.cond(is_first, first, lambda: ahead)
        multistep = s.next_alpha / s.alpha * (x - s.sigma * eps_bar) + s.next_sigma * eps_bar
        newest, second, _ = memory.eps
        remembered = LastNoises((eps, newest, second), memory.count + is_known)
        return Stepped(jnp.where(is_known, multistep, advance(x, x0, s)), x0, remembered)
