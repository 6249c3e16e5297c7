"""The forward process, and what a network may predict about it.

    x_t = alpha x0 + sigma eps                                                     (1)

A network predicts one of four combinations of x0 and eps:

    eps                                            Ho et al. 2020, eq. 14
    x0
    v = (alpha eps - sigma x0) / r                 Salimans & Ho 2022, eq. 12
    velocity = eps - x0                            Liu et al. 2022, eq. 1          (2)

r = sqrt(alpha^2 + sigma^2) is 1 where variance is preserved; with it v keeps unit size on every
schedule (at alpha = 1 it is minus EDM's F of Karras et al. 2022, eq. 7, sigma_data = 1). On a
rectified flow the velocity is d x_t / dt; on any other schedule it is that of the straight path
through the same x0 and eps, on which x_t / (alpha + sigma) lies at t = sigma / (alpha + sigma).

So every type means the same thing on every schedule, (1) and (2) are two equations in x0 and eps,
and all conversions solve them: nothing else in the package knows what a network predicts.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.schedules import Schedule

Prediction = Literal["eps", "x0", "v", "velocity"]
Images = Float[Array, "b h w c"]
Level = Float[Array, " b"] | Float[Array, ""]  # one for each image, or one for all

FLOOR = 1e-4  # of alpha and sigma in divisions: at t = 1 eps says nothing of x0, at t = 0 x0 of eps


def _over_images(level: Level) -> Float[Array, "#b 1 1 1"]:
    return level.reshape(-1, 1, 1, 1)


def add_noise(schedule: Schedule, x0: Images, eps: Images, t: Level) -> Images:
    """x_t of eq. 1, for times t in [0, 1]."""
    return _over_images(schedule.alpha(t)) * x0 + _over_images(schedule.sigma(t)) * eps


def to_x0_eps(
    prediction: Prediction,
    output: Images,
    x_t: Images,
    alpha: Level,
    sigma: Level,
    *,
    floor: float = FLOOR,
) -> tuple[Images, Images]:
    """The x0 and eps that a network's output stands for.

    "eps" divides by alpha and "x0" by sigma, which are taken to be at least `floor`; "v" and
    "velocity" are well posed everywhere. The map is affine in (output, x_t), so an error in the
    output maps to errors in x0 and eps by the same call with x_t = 0.
    """
    alpha, sigma = _over_images(alpha), _over_images(sigma)
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
    """What a network that predicts `prediction` would say if it knew x0 and eps, eq. 2."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        alpha, sigma = _over_images(alpha), _over_images(sigma)
        return (alpha * eps - sigma * x0) / jnp.hypot(alpha, sigma)
    return eps - x0
