"""Samplers of training times, t [b] in (0, 1]."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Positive
from jaxdiff.diffusion.schedules import shift_time
from jaxdiff.diffusion.time_shifts import TokenShift

T_MIN = 1e-5  # at t = 0 there is no noise to remove


def _uniform(key: Key[Array, ""], batch: int, stratified: bool) -> Float[Array, " b"]:
    """Sample uniformly from [T_MIN, 1 - T_MIN]; stratified: one sample per `batch` equal strata.

    Stratification lowers the variance of the loss (Kingma et al. 2021, appendix I.1). The strata
    are permuted, so that an image's time is independent of its place in the batch.
    """
    sample_key, permutation_key = jax.random.split(key)
    u = jax.random.uniform(sample_key, (batch,), jnp.float32)
    if stratified:
        u = (jax.random.permutation(permutation_key, batch) + u) / batch
    return jnp.clip(u, T_MIN, 1 - T_MIN)


@checked
@dataclass(frozen=True, kw_only=True)
class Uniform:
    """t ~ U(0, 1) (Ho et al. 2020, algorithm 1)."""

    stratified: bool = True

    def __call__(self, key: Key[Array, ""], batch: int, num_tokens: int) -> Float[Array, " b"]:
        """t [batch], float32."""
        return _uniform(key, batch, self.stratified)


@checked
@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """logit(t) ~ N(mean, std^2), then t -> s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 19, 23).

    A higher mean or a shift above 1 means more noise. shift adds log(shift) to the mean; they are
    separate because one depends on the data set and the other on the resolution. token_shift
    multiplies shift by what the number of image tokens asks for, as `FlowGrid` does.

    Raises:
        UserError: std or shift is not positive.
    """

    mean: float = 0.0
    std: Positive = 1.0
    shift: Positive = 1.0
    token_shift: TokenShift | None = None
    stratified: bool = True

    def __call__(self, key: Key[Array, ""], batch: int, num_tokens: int) -> Float[Array, " b"]:
        """t [batch], float32."""
        normal = jax.scipy.special.ndtri(_uniform(key, batch, self.stratified))
        t = shift_time(jax.nn.sigmoid(self.mean + self.std * normal), self.shift)
        if self.token_shift is not None:
            t = shift_time(t, self.token_shift(num_tokens))
        return jnp.maximum(t, T_MIN)


@runtime_checkable
class TimeSampler(Protocol):
    """Interface of distributions of training times; one's own is a frozen dataclass."""

    def __call__(self, key: Key[Array, ""], batch: int, num_tokens: int, /) -> Float[Array, " b"]:
        """Return times [batch] in [0, 1], float32."""
        ...


AnyTimeSampler = Uniform | LogitNormal | TimeSampler
