"""Initializers that XLA's CPU backend compiles quickly.

Random arrays of more axes take longer to compile (jax 0.10.2, CPU): about 0.2 s for one axis, 0.7
for two, 4 for the four of a convolution. A flat array that is reshaped has the same numbers.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Initializer
from jaxtyping import Array

_NO_KEY: Any = np.zeros(2, np.uint32)


class NoRngs(nnx.Rngs):
    """Keys for a module whose values are not used: these initializers return zeros for them.

    Tracing the random numbers takes half of the time.
    """

    def __init__(self):
        """Build them."""

    def params(self) -> Any:
        """Return the key that stands for none."""
        return _NO_KEY

    __call__ = params


def normal(std: float) -> Initializer:
    """Return an initializer of a normal distribution of mean 0."""
    return functools.partial(_normal, std)


def fan_in_normal() -> Initializer:
    """Return an initializer of a normal distribution of variance 1 / fan in (LeCun et al. 1998)."""
    return _fan_in_normal


def _normal(
    std: float,
    key: Array | np.ndarray,
    shape: Sequence[int],
    dtype: Any = jnp.float32,
    out_sharding: None = None,
) -> Array:
    if key is _NO_KEY:
        return jnp.zeros(shape, dtype)
    return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def _fan_in_normal(
    key: Array | np.ndarray,
    shape: Sequence[int],
    dtype: Any = jnp.float32,
    out_sharding: None = None,
) -> Array:
    return _normal(math.prod(shape[:-1]) ** -0.5, key, shape, dtype)
