"""A map on which what is close in a space is close on paper: exact t-SNE.

  p_j|i ~ exp(-beta_i |x_i - x_j|^2),  p_ij = (p_j|i + p_i|j) / 2n      (eq. 1 and section 3.1)
  q_ij  ~ 1 / (1 + |y_i - y_j|^2)                                       (eq. 4)
  dC/dy_i = 4 sum_j (p_ij - q_ij) (y_i - y_j) / (1 + |y_i - y_j|^2)     (eq. 5)

of van der Maaten & Hinton 2008, with beta_i such that each point has `perplexity` neighbours. It
starts from the principal components (Kobak & Berens 2019), so there is no chance in it, and its
learning rate grows with the number of points (Belkina et al. 2019).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.explore.axes import principal

Scalar = Float[Array, ""] | float

PERPLEXITY = 30.0
STEPS, EARLY = 750, 250  # the first of which draw clusters together
EXAGGERATION = 12.0
BISECTIONS = 40


def neighbour_map(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """Two coordinates for each of at least 4 points; memory and time grow with n^2."""
    start, _ = principal(vectors, 2)
    start = jnp.asarray(start / (start[:, 0].std() or 1.0) * 1e-4, jnp.float32)
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    # Apart from the descent, which then serves spaces of any width.
    return np.asarray(_descend(squared_distances(jnp.asarray(vectors)), start, perplexity))


@jax.jit
def squared_distances(x: Float[Array, "n d"]) -> Float[Array, "n n"]:
    """Of every two points; on the diagonal exactly 0."""
    square = jnp.sum(x**2, axis=1)
    product = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(square[:, None] + square - 2 * product, 0) * (1 - jnp.eye(len(x)))


@jax.jit
def _descend(
    squared: Float[Array, "n n"], start: Float[Array, "n 2"], perplexity: Scalar
) -> Float[Array, "n 2"]:
    n = len(squared)
    p, rate = _affinities(squared, perplexity), max(n / EXAGGERATION, 50.0)

    def step(i, state):
        y, speed = state
        near = (1 - jnp.eye(n)) / (1 + squared_distances(y))
        q = near / jnp.sum(near)
        pull = (jnp.where(i < EARLY, EXAGGERATION, 1.0) * p - q) * near
        gradient = 4 * (jnp.sum(pull, axis=1, keepdims=True) * y - pull @ y)
        speed = jnp.where(i < EARLY, 0.5, 0.8) * speed - rate * gradient
        return y + speed, speed

    y, _ = jax.lax.fori_loop(0, STEPS, step, (start, jnp.zeros_like(start)))
    return y - y.mean(0)


def _affinities(squared: Float[Array, "n n"], perplexity: Scalar) -> Float[Array, "n n"]:
    """p_ij, whose rows each have the entropy log(perplexity) before they are made symmetric."""
    n = len(squared)
    squared = squared / (jnp.sum(squared) / n**2)
    itself = jnp.eye(n, dtype=bool)

    def conditional(log_beta):
        logits = jnp.where(itself, -jnp.inf, -jnp.exp(log_beta)[:, None] * squared)
        return jax.nn.softmax(logits, axis=1)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        p = conditional(middle)
        entropy = -jnp.sum(jax.scipy.special.xlogy(p, p), axis=1)
        wide = entropy > jnp.log(perplexity)  # a larger beta has fewer neighbours
        return jnp.where(wide, middle, low), jnp.where(wide, high, middle)

    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.full(n, -15.0), jnp.full(n, 15.0)))
    p = conditional((low + high) / 2)
    return (p + p.T) / (2 * n)
