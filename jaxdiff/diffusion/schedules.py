"""Noise schedules: the amounts of data and noise at each time.

    x_t = alpha(t) x0 + sigma(t) eps,  t in [0, 1]: 0 is data, 1 is noise          (1)
    log_snr(t) = 2 log(alpha(t) / sigma(t))                                        (2)

Every schedule has alpha(0) = 1 and sigma(0) = 0 exactly, and log_snr decreases in t. Schedules of
equal log_snr differ only in the scale of x_t (Karras et al. 2022, section 2). `norm` = 1 fixes
that scale: sqrt(alpha^2 + sigma^2) for variance-preserving schedules, alpha + sigma for the
straight path, alpha for variance-exploding ones. `time_at` inverts sigma / alpha.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Annotated, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Positive, Range
from jaxdiff.errors import UserError

LOG_SNR_LIMIT = 40.0  # log_snr is clipped to +-40 to keep loss weights finite at the ends

Times = Float[Array, "*b"]


@runtime_checkable
class Schedule(Protocol):
    """A noise schedule; its methods are elementwise, on times of any shape."""

    def alpha(self, t: Times) -> Times:
        """Amount of data, in [0, 1]."""
        ...

    def sigma(self, t: Times) -> Times:
        """Amount of noise, at least 0."""
        ...

    def log_snr(self, t: Times) -> Times:
        """Logarithm of the signal-to-noise ratio, eq. 2, within +-LOG_SNR_LIMIT."""
        ...

    def time_at(self, noise_to_data: Times) -> Times:
        """The time at which sigma / alpha, in [0, inf], has the given value; 1 beyond sigma(1)."""
        ...


def _log_snr(alpha: Times, sigma: Times) -> Times:
    return jnp.clip(2 * (jnp.log(alpha) - jnp.log(sigma)), -LOG_SNR_LIMIT, LOG_SNR_LIMIT)


@checked
@dataclass(frozen=True, kw_only=True)
class Cosine:
    """alpha = cos(c t), sigma = sin(c t), c just under pi / 2.

    Nichol & Dhariwal 2021, eq. 17, in the continuous form of Hoogeboom et al. 2023 (simple
    diffusion, eq. 4). c is chosen such that log_snr(1) = min_log_snr. With c = pi / 2 there is no
    signal at t = 1, so x0 = (x_t - sigma eps) / alpha is undefined there. The default gives
    alpha(1) = 0.018, a quarter of Stable Diffusion's.

    Raises:
        UserError: min_log_snr is not negative.
    """

    min_log_snr: Annotated[float, Range(high=0, ends="[)")] = -8.0

    def _angle(self, t: Times) -> Times:
        return math.atan(math.exp(-self.min_log_snr / 2)) * t

    def alpha(self, t: Times) -> Times:
        """cos(c t)."""
        return jnp.cos(self._angle(t))

    def sigma(self, t: Times) -> Times:
        """sin(c t)."""
        return jnp.sin(self._angle(t))

    def log_snr(self, t: Times) -> Times:
        """-2 log tan(c t)."""
        return _log_snr(self.alpha(t), self.sigma(t))

    def time_at(self, noise_to_data: Times) -> Times:
        """arctan(sigma / alpha) / c, at most 1."""
        return jnp.minimum(jnp.arctan(noise_to_data) / self._angle(jnp.ones_like(noise_to_data)), 1)

    def norm(self, alpha: Times, sigma: Times) -> Times:
        """sqrt(alpha^2 + sigma^2): the variance is preserved."""
        return jnp.hypot(alpha, sigma)


@functools.lru_cache
def _noise_to_data(beta_start: float, beta_end: float, num_train_steps: int) -> np.ndarray:
    """Return sigma / alpha [num_train_steps], in float64 for an accurate product."""
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_steps, dtype=np.float64) ** 2
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    return np.sqrt(-np.expm1(log_alpha_bar)) / np.exp(log_alpha_bar / 2)


def _zero_terminal(ratio: np.ndarray, terminal_alpha_bar: float) -> np.ndarray:
    """Return sigma / alpha with alpha 0 at the last step (Lin et al. 2023, algorithm 1)."""
    alpha = 1 / np.hypot(1, ratio)
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha[-1] = terminal_alpha_bar**0.5
    with np.errstate(divide="ignore"):
        return np.sqrt(1 - alpha**2) / alpha


@checked
@dataclass(frozen=True, kw_only=True)
class ScaledLinear:
    """The discrete schedule of Stable Diffusion (Rombach et al. 2022), interpolated in time.

    sqrt(beta_i) is linear in i, alpha^2 = prod(1 - beta_i) (Ho et al. 2020, eq. 4). Training step
    i, counted from 0, is t = (i + 1) / num_train_steps; t = 0 is data. Between these times
    sigma / alpha is interpolated linearly in t, as in diffusers' Euler scheduler.

    Attributes:
        beta_start: the first beta.
        beta_end: the last beta.
        num_train_steps: the number of betas.
        zero_terminal_snr: rescale alpha to 0 at t = 1 (Lin et al. 2023, algorithm 1); unsuitable
            for networks that predict eps, which does not determine x0 there.
        terminal_alpha_bar: alpha^2 at t = 1 after that rescaling; 2^-24 in diffusers' schedulers
            that step in sigma / alpha, whose multistep solvers need a finite one.

    Raises:
        UserError: betas outside 0 < beta_start <= beta_end < 1, fewer than two steps, or a
            terminal_alpha_bar outside [0, 0.001].
    """

    beta_start: Annotated[float, Range(0, 1, "()")] = 0.00085
    beta_end: Annotated[float, Range(0, 1, "()")] = 0.012
    num_train_steps: Annotated[int, Range(2)] = 1000
    zero_terminal_snr: bool = False
    terminal_alpha_bar: Annotated[float, Range(0, 1e-3)] = 0.0

    def __post_init__(self):
        if self.beta_start > self.beta_end:
            raise UserError(
                f"ScaledLinear got beta_start={self.beta_start}, beta_end={self.beta_end}: "
                "expected 0 < beta_start <= beta_end < 1."
            )

    def _table(self) -> np.ndarray:
        """sigma / alpha [num_train_steps + 1], from t = 0."""
        table = _noise_to_data(self.beta_start, self.beta_end, self.num_train_steps)
        if self.zero_terminal_snr:
            table = _zero_terminal(table, self.terminal_alpha_bar)
        return np.concatenate([[0.0], table])

    def _ratio(self, t: Times) -> Times:
        """sigma / alpha, linearly interpolated."""
        table = jnp.asarray(self._table(), t.dtype)
        place = jnp.clip(t * self.num_train_steps, 0, self.num_train_steps)
        # Rounding moves t = (i + 1) / num_train_steps slightly off the table's entries.
        whole = jnp.round(place)
        place = jnp.where(jnp.abs(place - whole) < 1e-6 * self.num_train_steps, whole, place)
        low = jnp.floor(place).astype(jnp.int32)
        fraction, last = place - low, self.num_train_steps
        high = table[jnp.minimum(low + 1, last)]
        # The table's last entry may be infinite.
        return jnp.where(fraction > 0, (1 - fraction) * table[low] + fraction * high, table[low])

    def log_snr(self, t: Times) -> Times:
        """-2 log(sigma / alpha)."""
        return jnp.clip(-2 * jnp.log(self._ratio(t)), -LOG_SNR_LIMIT, LOG_SNR_LIMIT)

    def alpha(self, t: Times) -> Times:
        """sqrt(alpha_bar)."""
        return jax.lax.rsqrt(1 + self._ratio(t) ** 2)

    def sigma(self, t: Times) -> Times:
        """sqrt(1 - alpha_bar)."""
        return jax.lax.rsqrt(1 + self._ratio(t) ** -2)

    def time_at(self, noise_to_data: Times) -> Times:
        """The table inverted by linear interpolation; 1 beyond its end."""
        table = self._table().astype(noise_to_data.dtype)
        times = np.arange(self.num_train_steps + 1, dtype=table.dtype) / self.num_train_steps
        inside = jnp.interp(noise_to_data, table, times)
        return jnp.where(noise_to_data >= table[-1], 1.0, inside)

    def norm(self, alpha: Times, sigma: Times) -> Times:
        """sqrt(alpha^2 + sigma^2): the variance is preserved."""
        return jnp.hypot(alpha, sigma)


@checked
@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """alpha = 1 - t, sigma = t: the straight path (Liu et al. 2022, eq. 1; Lipman et al. 2023)."""

    def alpha(self, t: Times) -> Times:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Times) -> Times:
        """t."""
        return t

    def log_snr(self, t: Times) -> Times:
        """2 log((1 - t) / t)."""
        return _log_snr(1 - t, t)

    def time_at(self, noise_to_data: Times) -> Times:
        """1 / (1 + alpha / sigma)."""
        return 1 / (1 + 1 / noise_to_data)

    def norm(self, alpha: Times, sigma: Times) -> Times:
        """alpha + sigma."""
        return alpha + sigma


@checked
@dataclass(frozen=True, kw_only=True)
class VarianceExploding:
    """alpha = 1, sigma up to sigma_max (Karras et al. 2022, eq. 5 and table 1).

    sigma(t)^(1/rho) is linear from sigma_min, just above t = 0, to sigma_max at t = 1; sigma(0) is
    0, as EDM's last step. x_t grows with sigma: scale it by 1 / sqrt(1 + sigma^2) inside the
    network.

    Raises:
        UserError: not 0 < sigma_min < sigma_max, or rho below 1.
    """

    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Annotated[float, Range(1)] = 7.0

    def __post_init__(self):
        if self.sigma_min >= self.sigma_max:
            raise UserError(
                f"VarianceExploding got sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: "
                "expected 0 < sigma_min < sigma_max."
            )

    def alpha(self, t: Times) -> Times:
        """1."""
        return jnp.ones_like(t)

    def sigma(self, t: Times) -> Times:
        """(low + t (high - low))^rho; low, high: the rho-th roots of sigma_min, sigma_max."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return jnp.where(t > 0, (low + t * (high - low)) ** self.rho, 0.0)

    def log_snr(self, t: Times) -> Times:
        """-2 log sigma."""
        return _log_snr(self.alpha(t), self.sigma(t))

    def time_at(self, noise_to_data: Times) -> Times:
        """The inverse of sigma, within [0, 1]."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return jnp.clip((noise_to_data ** (1 / self.rho) - low) / (high - low), 0, 1)

    def norm(self, alpha: Times, sigma: Times) -> Times:
        """alpha: the data keep their scale."""
        return alpha


@checked
@dataclass(frozen=True, kw_only=True)
class Shifted:
    """A schedule with its log_snr lowered by 2 log(shift), for higher resolutions.

    Higher resolutions need more noise to destroy the same structure: Hoogeboom et al. 2023, eq. 3
    (there shift = side / 64). On a rectified flow this is t' = s t / (1 + (s - 1) t), the shift of
    Stable Diffusion 3 (Esser et al. 2024, eq. 23).

    Raises:
        UserError: shift is not positive.
    """

    base: Cosine | ScaledLinear | RectifiedFlow | VarianceExploding = field(
        default_factory=RectifiedFlow
    )
    shift: Positive = 1.0

    def alpha(self, t: Times) -> Times:
        """The base's alpha, renormalised after scaling sigma."""
        alpha, sigma = self.base.alpha(t), self.shift * self.base.sigma(t)
        return alpha / self.base.norm(alpha, sigma)

    def sigma(self, t: Times) -> Times:
        """shift times the base's sigma, renormalised."""
        alpha, sigma = self.base.alpha(t), self.shift * self.base.sigma(t)
        return sigma / self.base.norm(alpha, sigma)

    def log_snr(self, t: Times) -> Times:
        """The base's log_snr - 2 log(shift)."""
        shifted = self.base.log_snr(t) - 2 * math.log(self.shift)
        return jnp.clip(shifted, -LOG_SNR_LIMIT, LOG_SNR_LIMIT)

    def time_at(self, noise_to_data: Times) -> Times:
        """The base's time at noise_to_data / shift."""
        return self.base.time_at(noise_to_data / self.shift)


AnySchedule = Cosine | ScaledLinear | RectifiedFlow | VarianceExploding | Shifted | Schedule


def shift_time(t: Times, shift: float | Float[Array, ""]) -> Times:
    """s t / (1 + (s - 1) t), a map of [0, 1] onto itself (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)
