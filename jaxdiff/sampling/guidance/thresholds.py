"""Thresholds: keep estimates of x0 in the range of the data."""

from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import jax.numpy as jnp

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Positive, Range
from jaxdiff.diffusion.process import Images


@runtime_checkable
class Threshold(Protocol):
    """Interface of thresholds; one's own is a frozen dataclass with this method."""

    def __call__(self, x0: Images, /) -> Images:
        """Return an estimate of x0 in range."""
        ...


@checked
@dataclass(frozen=True, kw_only=True)
class StaticThreshold:
    """Clip x0 to [-bound, bound]; pixels lie in [-1, 1].

    Raises:
        UserError: bound is not positive.
    """

    bound: Positive = 1.0

    def __call__(self, x0: Images) -> Images:
        """Clip."""
        return jnp.clip(x0, -self.bound, self.bound)


@checked
@dataclass(frozen=True, kw_only=True)
class DynamicThreshold:
    """Clip each image at a quantile of |x0|, then scale it to [-1, 1].

    Saharia et al. 2022, section 2.3: pixels then do not saturate under strong guidance. An
    image whose quantile is below 1 is only clipped.

    Raises:
        UserError: quantile outside (0, 1].
    """

    quantile: Annotated[float, Range(0, 1, "(]")] = 0.995

    def __call__(self, x0: Images) -> Images:
        """Clip and scale to [-1, 1]."""
        size = jnp.quantile(jnp.abs(x0), self.quantile, axis=(1, 2, 3), keepdims=True)
        size = jnp.maximum(size, 1.0)
        return jnp.clip(x0, -size, size) / size


AnyThreshold = StaticThreshold | DynamicThreshold | Threshold
