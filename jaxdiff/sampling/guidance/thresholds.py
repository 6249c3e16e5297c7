"""Thresholds: keep estimates of x0 in the range of the data."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from jaxdiff.diffusion.process import Images
from jaxdiff.errors import UserError


@runtime_checkable
class Threshold(Protocol):
    """Interface of thresholds; one's own is a frozen dataclass with this method."""

    def __call__(self, x0: Images, /) -> Images:
        """Return an estimate of x0 in range."""
        ...


@dataclass(frozen=True, kw_only=True)
class StaticThreshold:
    """Clip x0 to [-bound, bound]; pixels lie in [-1, 1].

    Raises:
        UserError: bound is not positive.
    """

    bound: float = 1.0

    def __post_init__(self):
        if not self.bound > 0:
            raise UserError(f"StaticThreshold.bound is {self.bound}: expected a positive number.")

    def __call__(self, x0: Images) -> Images:
        """Clip."""
        return jnp.clip(x0, -self.bound, self.bound)


@dataclass(frozen=True, kw_only=True)
class DynamicThreshold:
    """Clip each image at a quantile of |x0|, then scale it to [-1, 1].

    Saharia et al. 2022, section 2.3: pixels then do not saturate under strong guidance. An
    image whose quantile is below 1 is only clipped.

    Raises:
        UserError: quantile outside (0, 1].
    """

    quantile: float = 0.995

    def __post_init__(self):
        if not 0 < self.quantile <= 1:
            raise UserError(
                f"DynamicThreshold.quantile is {self.quantile}: expected one in (0, 1]."
            )

    def __call__(self, x0: Images) -> Images:
        """Clip and scale to [-1, 1]."""
        size = jnp.quantile(jnp.abs(x0), self.quantile, axis=(1, 2, 3), keepdims=True)
        size = jnp.maximum(size, 1.0)
        return jnp.clip(x0, -size, size) / size


AnyThreshold = StaticThreshold | DynamicThreshold | Threshold
