"""Weightings of the training loss.

    loss = w_s(log_snr(t)) mean((prediction_s - target_s)^2),  s the space of the loss   (1)

A weighting applies to the error in eps, and is converted to other spaces so that (1) has the same
value in all of them. With snr = alpha^2 / sigma^2 and x_t fixed, an error in eps is

    (error in x0)^2 = (error in eps)^2 / snr
    (error in v)^2 = (error in eps)^2 (1 + 1 / snr)                                     (2)
    (error in velocity)^2 = (error in eps)^2 (1 + 1 / sqrt(snr))^2

and w_s is w_eps over that factor. The exception is `UniformWeighting`: 1 in the space of the loss.
A weighting multiplies the density of the time sampler; the -d log_snr / dt of Kingma & Gao 2023,
eq. 8, is not part of it.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Positive
from jaxdiff.diffusion.process import Prediction


def _in_space(
    log_weight: Float[Array, " b"], log_snr: Float[Array, " b"], space: Prediction
) -> Float[Array, " b"]:
    """Convert the logarithm of a weight on eps to a weight in another space, by eq. 2."""
    log_factor = {
        "eps": jnp.zeros_like(log_snr),
        "x0": -log_snr,
        "v": jax.nn.softplus(-log_snr),
        "velocity": 2 * jax.nn.softplus(-log_snr / 2),
    }[space]
    return jnp.exp(log_weight - log_factor)


@checked
@dataclass(frozen=True, kw_only=True)
class UniformWeighting:
    """1 at every level, in the space of the loss (Ho et al. 2020, eq. 14, for eps)."""

    def __call__(
        self, log_snr: Float[Array, " b"], space: Prediction = "eps"
    ) -> Float[Array, " b"]:
        """Return ones [b]."""
        return jnp.ones_like(log_snr)


@checked
@dataclass(frozen=True, kw_only=True)
class MinSNR:
    """min(snr, gamma) on x0, min(1, gamma / snr) on eps (Hang et al. 2023, section 3.4).

    Bounds the weight of nearly clean levels, whose x0 is easy to predict.

    Raises:
        UserError: gamma is not positive.
    """

    gamma: Positive = 5.0

    def __call__(
        self, log_snr: Float[Array, " b"], space: Prediction = "eps"
    ) -> Float[Array, " b"]:
        """Return weights [b], at most gamma on x0."""
        log_weight = jnp.minimum(0.0, jnp.log(self.gamma) - log_snr)
        return _in_space(log_weight, log_snr, space)


@checked
@dataclass(frozen=True, kw_only=True)
class SigmoidWeighting:
    """sigmoid(bias - log_snr) on eps (Kingma & Gao 2023, section 5; Hoogeboom et al. 2024, eq. 11).

    A larger bias gives the finer details more weight.
    """

    bias: float = 0.0

    def __call__(
        self, log_snr: Float[Array, " b"], space: Prediction = "eps"
    ) -> Float[Array, " b"]:
        """Return weights [b], at most 1 on eps."""
        return _in_space(jax.nn.log_sigmoid(self.bias - log_snr), log_snr, space)


@runtime_checkable
class Weighting(Protocol):
    """Interface of loss weights; one's own is a frozen dataclass with this method."""

    def __call__(self, log_snr: Float[Array, " b"], space: Prediction, /) -> Float[Array, " b"]:
        """Return weights [b] of errors in a space."""
        ...


AnyWeighting = UniformWeighting | MinSNR | SigmoidWeighting | Weighting


def loss_by_level(
    loss: Float[Array, " b"], t: Float[Array, " b"]
) -> tuple[Float[Array, "10"], Float[Array, "10"]]:
    """Return sums and counts of the loss in 10 bins of t, where bin k has k < 10 t <= k + 1.

    Sums and counts, unlike means, add up over steps and hosts.
    """
    bins = jnp.clip(jnp.ceil(t * 10).astype(jnp.int32) - 1, 0, 9)
    member = jax.nn.one_hot(bins, 10, dtype=jnp.float32)
    return loss @ member, jnp.sum(member, axis=0)
