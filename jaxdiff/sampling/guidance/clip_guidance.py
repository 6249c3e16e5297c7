"""Guidance by a second model: CLIP looks at the estimate of the finished image.

By Bayes' rule the score of images under a prompt is that of all images and the gradient of
log p(prompt | x_t) (Dhariwal & Nichol 2021, eq. 10); as an estimate of x0 that is

    x0' = x0 + sigma^2 / alpha  d log p(prompt | x_t) / d x_t                              (1)

CLIP's logit for the estimate, times a scale, is taken as log p (Bansal et al. 2023, universal
guidance, eq. 6). The derivative of x0 by x_t is alpha / sigma^2 times the covariance of x0 given
x_t (Efron 2011, Tweedie's formula): with that of independent data of unit variance,

    x0' = x0 + scale sigma^2 / (alpha^2 + sigma^2)  d match(x0) / d x0                     (2)

which needs no pass back through the denoiser, whose own derivative is far from exact where there
is most noise and (1) magnifies it most.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.process import Images
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.errors import UserError
from jaxdiff.sampling.solvers_ode import Scalar
from jaxdiff.sampling.stateful_denoiser import AnyDenoise, then

Match = Callable[[Images, Scalar], Float[Array, " b"]]  # (x0, t) -> how well they match

_LEAST_CUT = 0.5  # side of the smallest cut-out, over that of the largest


@dataclass(frozen=True, kw_only=True)
class ClipGuidance:
    """Which CLIP steers, how strongly, when, and by how close a look.

    Attributes:
      model: its folder (of a run, exported, or as transformers has it), `shipped:NAME`, or the
        OWNER/NAME of one of the Hugging Face hub.
      scale: of the gradient; 0 leaves the image to the denoiser.
      interval: times at which it steers.
      cutouts: random squares of the image that CLIP looks at, in the place of the whole; many make
        the match hard to improve by noise that no one sees.

    Raises:
      UserError: a number out of range.
    """

    model: str = "shipped:produce_clip"
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    cutouts: int = 0

    def __post_init__(self):
        low, high = self.interval
        if not 0 <= low <= high <= 1 or self.cutouts < 0 or not 0 <= self.scale < float("inf"):
            raise UserError(
                f"ClipGuidance got scale={self.scale}, interval={self.interval}, "
                f"cutouts={self.cutouts}; give a scale of 0 or more, an interval (low, high) in "
                "[0, 1], and 0 or more cut-outs."
            )


def steered(
    denoise: AnyDenoise,
    match: Match,
    schedule: Schedule,
    scale: Float[Array, ""],
    *,
    interval: tuple[float, float] = (0.0, 1.0),
) -> AnyDenoise:
    """A denoiser whose estimates match better, eq. 2; outside the interval the same as before.

    scale may be traced. Where nothing is steered `match` is not evaluated.
    """

    def steer(x0: Images, t: Scalar) -> Images:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        gradient = jax.grad(lambda x0: jnp.sum(match(x0, t)))(x0)
        return x0 + scale * sigma**2 / (alpha**2 + sigma**2) * gradient

    def guided(x0: Images, t: Scalar) -> Images:
        low, high = interval
        return jax.lax.cond((low <= t) & (t <= high), steer, lambda x0, t: x0, x0, t)

    return then(denoise, guided)


def look(
    images: Float[Array, "b h w 3"], size: int, cutouts: int, t: Scalar
) -> Float[Array, "k {size} {size} 3"]:
    """What CLIP sees of images in [-1, 1]: each as a whole, or so many cut-outs of each.

    The squares differ from time to time, but not from image to image, so that what is drawn of one
    does not depend on its place.
    """
    b, height, width, _ = images.shape
    if not cutouts:
        whole = (height, width) == (size, size)
        return images if whole else jax.image.resize(images, (b, size, size, 3), "bilinear")
    key = jax.random.fold_in(jax.random.key(0), (t * 2**20).astype(jnp.int32))
    draws = jax.random.uniform(key, (cutouts, 3))
    sides = min(height, width) * (_LEAST_CUT + (1 - _LEAST_CUT) * draws[:, 0])

    def cut(side: Scalar, place: Float[Array, " 2"]) -> Float[Array, "b s s 3"]:
        start = place * (jnp.array([height, width]) - side)
        scale = jnp.broadcast_to(size / side, (2,))
        shape = (b, size, size, 3)
        return jax.image.scale_and_translate(
            images, shape, (1, 2), scale, -start * scale, "bilinear"
        )

    return jnp.concatenate([cut(sides[k], draws[k, 1:]) for k in range(cutouts)])
