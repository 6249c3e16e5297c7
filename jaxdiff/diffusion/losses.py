"""The training objective and its weightings.

    loss = w_s(log_snr(t)) mean((prediction_s - target_s)^2),  s the space of the loss   (1)

A weighting is stated for the error in eps, and carried to other spaces so that (1) has the same
value in all of them. With snr = alpha^2 / sigma^2, x_t being known, an error in eps is

    (error in x0)^2 = (error in eps)^2 / snr
    (error in v)^2 = (error in eps)^2 (1 + 1 / snr)                                     (2)
    (error in velocity)^2 = (error in eps)^2 (1 + 1 / sqrt(snr))^2

and w_s is w_eps over that factor. `UniformWeighting` alone is meant literally: 1 in the space of
the loss. A weighting multiplies whatever density of times the time sampler has; the
-d log_snr / dt of Kingma & Gao 2023, eq. 8, is not part of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.diffusion.process import Images, Prediction, add_noise, from_x0_eps, to_x0_eps
from jaxdiff.diffusion.schedules import AnySchedule, Cosine
from jaxdiff.diffusion.time_sampling import TimeSampler, Uniform
from jaxdiff.errors import UserError

Network = Callable[[Images, Float[Array, " b"]], Images]  # (x_t, t [b]) -> prediction


def _in_space(
    log_weight: Float[Array, " b"], log_snr: Float[Array, " b"], space: Prediction
) -> Float[Array, " b"]:
    """Carries the logarithm of a weight on eps to another space, by eq. 2."""
    log_factor = {
        "eps": jnp.zeros_like(log_snr),
        "x0": -log_snr,
        "v": jax.nn.softplus(-log_snr),
        "velocity": 2 * jax.nn.softplus(-log_snr / 2),
    }[space]
    return jnp.exp(log_weight - log_factor)


@dataclass(frozen=True, kw_only=True)
class UniformWeighting:
    """One at every level, in whichever space the loss is (Ho et al. 2020, eq. 14, for eps)."""

    def __call__(
        self, log_snr: Float[Array, " b"], space: Prediction = "eps"
    ) -> Float[Array, " b"]:
        """Ones [b]."""
        return jnp.ones_like(log_snr)


@dataclass(frozen=True, kw_only=True)
class MinSNR:
    """min(snr, gamma) on x0, min(1, gamma / snr) on eps (Hang et al. 2023, section 3.4).

    It keeps the nearly clean levels, whose x0 is easy, from drowning out the others.

    Raises:
        UserError: gamma is not positive.
    """

    gamma: float = 5.0

    def __post_init__(self):
        if not self.gamma > 0:
            raise UserError(f"MinSNR.gamma is {self.gamma}; give a positive number such as 5.")

    def __call__(
        self, log_snr: Float[Array, " b"], space: Prediction = "eps"
    ) -> Float[Array, " b"]:
        """Weights [b], at most gamma on x0."""
        log_weight = jnp.minimum(0.0, jnp.log(self.gamma) - log_snr)
        return _in_space(log_weight, log_snr, space)


@dataclass(frozen=True, kw_only=True)
class SigmoidWeighting:
    """sigmoid(bias - log_snr) on eps (Kingma & Gao 2023, section 5; Hoogeboom et al. 2024, eq. 11).

    A larger bias gives the finer details more weight.
    """

    bias: float = 0.0

    def __call__(
        self, log_snr: Float[Array, " b"], space: Prediction = "eps"
    ) -> Float[Array, " b"]:
        """Weights [b], at most 1 on eps."""
        return _in_space(jax.nn.log_sigmoid(self.bias - log_snr), log_snr, space)


Weighting = UniformWeighting | MinSNR | SigmoidWeighting  # called with (log_snr, space)


class Losses(NamedTuple):
    """What each image contributed."""

    loss: Float[Array, " b"]  # weighted, float32
    t: Float[Array, " b"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the network predicts, on which noise, and how its error counts.

    `loss_on` is the space of the loss; none means that of the prediction. JiT (Li & He 2025,
    arXiv 2511.13720) is prediction="x0", loss_on="velocity". Carrying an error from x0 to another
    space divides by sigma, and from eps by alpha, which are taken to be at least `floor` (JiT's
    0.05): it bounds the weight that the ends can get. `noise_offset` adds to eps that much normal
    noise that is the same at all pixels of a channel (Guttenberg 2023, "Diffusion with offset
    noise"; 0.1 there), without which a network never learns how bright an image is as a whole.

    Raises:
        UserError: floor is not positive, or noise_offset is negative.
    """

    prediction: Prediction = "eps"
    loss_on: Prediction | None = None
    schedule: AnySchedule = field(default_factory=Cosine)
    times: TimeSampler = field(default_factory=Uniform)
    weighting: Weighting = field(default_factory=UniformWeighting)
    floor: float = 0.05
    noise_offset: float = 0.0

    def __post_init__(self):
        if not self.floor > 0 or self.noise_offset < 0:
            raise UserError(
                f"Objective got floor={self.floor}, noise_offset={self.noise_offset}; give a "
                "positive floor, and 0 or more as noise_offset."
            )

    def loss(
        self,
        network: Network,
        x0: Images,
        key: Key[Array, ""],
        max_t: float | Float[Array, ""] = 1.0,
    ) -> Losses:
        """Noises x0 at drawn times, asks the network, and weighs its error, eq. 1.

        Each image has noise of its own, drawn from (key, its place). `max_t` scales the times, as a
        noise curriculum asks.
        """
        batch = x0.shape[0]
        time_key, noise_key = jax.random.split(key)
        t = self.times(time_key, batch) * max_t
        noise_keys = jax.vmap(jax.random.fold_in, (None, 0))(noise_key, jnp.arange(batch))
        eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:], jnp.float32))(noise_keys)
        if self.noise_offset:
            offset_keys = jax.vmap(jax.random.fold_in, (0, None))(noise_keys, 1)
            channels = (1, 1, x0.shape[-1])
            offset = jax.vmap(lambda key: jax.random.normal(key, channels, jnp.float32))(
                offset_keys
            )
            eps = eps + self.noise_offset * offset
        x0 = x0.astype(jnp.float32)

        output = network(add_noise(self.schedule, x0, eps, t), t).astype(jnp.float32)
        return Losses(loss=self.weighted_error(output, x0, eps, t), t=t)

    def weighted_error(
        self, output: Images, x0: Images, eps: Images, t: Float[Array, " b"]
    ) -> Float[Array, " b"]:
        """Eq. 1 for each image, given what the network said of x_t."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        space = self.loss_on or self.prediction
        error = output - from_x0_eps(self.prediction, x0, eps, alpha, sigma)
        if space != self.prediction:
            # Affine conversions carry an error as they carry an output, with x_t = 0; so no two
            # large numbers are subtracted, and the floor acts on target and prediction alike.
            errors = to_x0_eps(
                self.prediction, error, jnp.zeros_like(error), alpha, sigma, floor=self.floor
            )
            error = from_x0_eps(space, *errors, alpha, sigma)
        weight = self.weighting(self.schedule.log_snr(t), space)
        return weight * jnp.mean(error**2, axis=(1, 2, 3))


def loss_by_level(
    loss: Float[Array, " b"], t: Float[Array, " b"], levels: int = 10
) -> tuple[Float[Array, " levels"], Float[Array, " levels"]]:
    """Sums and counts of the loss in `levels` equal bins of t, bin k holding k < t levels <= k + 1.

    Sums and counts, unlike means, add up over steps and hosts.
    """
    bins = jnp.clip(jnp.ceil(t * levels).astype(jnp.int32) - 1, 0, levels - 1)
    member = jax.nn.one_hot(bins, levels, dtype=jnp.float32)
    return loss @ member, jnp.sum(member, axis=0)
