"""First weights, drawn so that XLA's CPU backend compiles them quickly.

The more axes a draw of random numbers has, the longer it takes to compile (jax 0.10.2, CPU): about
0.2 s with one, 0.7 with two, 4 with the four of a convolution. Drawn flat, then given their shape,
the numbers are the same.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array


def normal(std: float) -> Initializer:
    """A normal distribution of mean 0."""
    return functools.partial(_draw, std)


def fan_in_normal() -> Initializer:
    """A normal distribution of variance 1 / fan in (LeCun et al. 1998): outputs are like inputs."""
    return _draw_by_fan_in


def _draw(
    std: float,
    key: Array,
    shape: Sequence[int],
    dtype: Any = jnp.float32,
    out_sharding: None = None,
) -> Array:
    return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def _draw_by_fan_in(
    key: Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: None = None
) -> Array:
    return _draw(math.prod(shape[:-1]) ** -0.5, key, shape, dtype)
