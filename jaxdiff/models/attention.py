"""Multi-head attention with normalised queries and keys, as the denoisers use it."""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxdiff.models.layers import Dense, rotate


def linear(inputs: int, outputs: int, rngs: nnx.Rngs, *, zero: bool = False, bias: bool = True):
    """A linear layer with Xavier's initialisation, or one that starts at zero."""
    init = nnx.initializers.zeros if zero else nnx.initializers.xavier_uniform()
    return Dense(inputs, outputs, kernel_init=init, use_bias=bias, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys (Henry et al. 2020)."""

    def __init__(self, width: int, heads: int, *, source_width: int, rngs: nnx.Rngs, zero=False):
        self.heads = heads
        self.q = linear(width, width, rngs, bias=False)
        self.k = linear(source_width, width, rngs, bias=False)
        self.v = linear(source_width, width, rngs, bias=False)
        self.out = linear(width, width, rngs, zero=zero)
        self.q_norm = nnx.RMSNorm(width // heads, rngs=rngs)
        self.k_norm = nnx.RMSNorm(width // heads, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        source: Float[Array, "b m e"],
        *,
        angles: Float[Array, "n half"] | None = None,
        mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b n d"]:
        """x, the queries, reads the source where the mask is true; angles turn queries and keys."""
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1)
            for y in (self.q(x), self.k(source), self.v(source))
        )
        q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if mask is not None:
            mask = mask[:, None, None, :]
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return self.out(y.reshape(x.shape))
