"""The forward process and the prediction types of a network.

    x_t = alpha x0 + sigma eps                                                     (1)

A network predicts one of four combinations of x0 and eps:

    eps                                            Ho et al. 2020, eq. 14
    x0
    v = (alpha eps - sigma x0) / r                 Salimans & Ho 2022, eq. 12
    velocity = eps - x0                            Liu et al. 2022, eq. 1          (2)

r = sqrt(alpha^2 + sigma^2), which is 1 for variance-preserving schedules, gives v unit variance on
every schedule (at alpha = 1, v is -F of Karras et al. 2022, eq. 7, with sigma_data = 1). On a
rectified flow the velocity is d x_t / dt; on any other schedule it is the velocity of the straight
path through the same x0 and eps, where x_t / (alpha + sigma) lies at t = sigma / (alpha + sigma).

All conversions solve (1) and (2) for x0 and eps; no other module depends on the prediction type.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.schedules import Schedule

Prediction = Literal["eps", "x0", "v", "velocity"]
Images = Float[Array, "b h w c"]
Level = Float[Array, " b"] | Float[Array, ""]  # one per image, or one for all

FLOOR = 1e-4  # least divisor: eps does not determine x0 at alpha = 0, nor x0 eps at sigma = 0


def over_images(level: Level) -> Float[Array, "#b 1 1 1"]:
    """Reshape a level for each image so that it multiplies images."""
    return level.reshape(-1, 1, 1, 1)


def add_noise(schedule: Schedule, x0: Images, eps: Images, t: Level) -> Images:
    """Return x_t of eq. 1, for t in [0, 1]."""
    return over_images(schedule.alpha(t)) * x0 + over_images(schedule.sigma(t)) * eps


def to_x0_eps(
    prediction: Prediction,
    output: Images,
    x_t: Images,
    alpha: Level,
    sigma: Level,
    *,
    floor: float = FLOOR,
) -> tuple[Images, Images]:
    """Convert a network's output to x0 and eps.

    "eps" divides by alpha and "x0" by sigma, each clipped below at `floor`; "v" and "velocity" are
    well posed everywhere. The map is affine in (output, x_t): with x_t = 0 it converts an error in
    the output to errors in x0 and eps.
    """
    alpha, sigma = over_images(alpha), over_images(sigma)
    if prediction == "eps":
        return (x_t - sigma * output) / jnp.maximum(alpha, floor), output
    if prediction == "x0":
        return output, (x_t - alpha * output) / jnp.maximum(sigma, floor)
    if prediction == "v":
        r = jnp.hypot(alpha, sigma)
        return (alpha * x_t / r - sigma * output) / r, (sigma * x_t / r + alpha * output) / r
    total = alpha + sigma
    return (x_t - sigma * output) / total, (x_t + alpha * output) / total


def from_x0_eps(
    prediction: Prediction, x0: Images, eps: Images, alpha: Level, sigma: Level
) -> Images:
    """Return the training target of a prediction type, eq. 2."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        alpha, sigma = over_images(alpha), over_images(sigma)
        return (alpha * eps - sigma * x0) / jnp.hypot(alpha, sigma)
    return eps - x0
