"""CLIP guidance: the gradient of CLIP's similarity between the estimate of x0 and the prompt.

By Bayes' rule the score of images under a prompt is that of all images and the gradient of
log p(prompt | x_t) (Dhariwal & Nichol 2021, eq. 10); as an estimate of x0 that is

    x0' = x0 + sigma^2 / alpha  d log p(prompt | x_t) / d x_t                              (1)

CLIP's logit for the estimate, times a scale, is taken as log p (Bansal et al. 2023, universal
guidance, eq. 6). The derivative of x0 by x_t is alpha / sigma^2 times the covariance of x0 given
x_t (Efron 2011, Tweedie's formula): with that of independent data of unit variance,

    x0' = x0 + scale sigma^2 / (alpha^2 + sigma^2)  d match(x0) / d x0                     (2)

which needs no backward pass through the denoiser. Its derivative is least exact at high noise,
where (1) amplifies it most.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Interval, Natural, NotNegative
from jaxdiff.diffusion.process import Images
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.sampling.solver import Scalar, StatefulDenoiser, map_x0

Match = Callable[[Images, Scalar], Float[Array, " b"]]  # (x0, t) -> logit

_SMALLEST_CUTOUT = 0.5  # its side, over that of the largest


@checked
@dataclass(frozen=True, kw_only=True)
class ClipGuidance:
    """Settings of CLIP guidance.

    Attributes:
      model: folder of a CLIP (of a run, exported, or as transformers writes it), `shipped:NAME`, or
        an OWNER/NAME of the Hugging Face hub.
      scale: factor on the gradient; 0 has no effect.
      interval: times of t, from 0 to 1, at which it acts.
      cutouts: number of random square crops that CLIP encodes instead of the whole image; more
        crops suppress adversarial noise.

    Raises:
      UserError: a number out of range.
    """

    model: str = "shipped:produce_clip"
    scale: NotNegative = 1.0
    interval: Annotated[tuple[float, float], Interval()] = (0.0, 1.0)
    cutouts: Natural = 0


def with_clip_guidance(
    denoiser: StatefulDenoiser,
    match: Match,
    schedule: Schedule,
    scale: Float[Array, ""],
    *,
    interval: tuple[float, float] = (0.0, 1.0),
) -> StatefulDenoiser:
    """Add eq. 2 to a denoiser's estimates, within the interval of times.

    scale may be traced. Outside the interval `match` is not evaluated.
    """

    def steer(x0: Images, t: Scalar) -> Images:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        gradient = jax.grad(lambda x0: jnp.sum(match(x0, t)))(x0)
        return x0 + scale * sigma**2 / (alpha**2 + sigma**2) * gradient

    def guided(x0: Images, t: Scalar) -> Images:
        low, high = interval
        return jax.lax.cond((low <= t) & (t <= high), steer, lambda x0, t: x0, x0, t)

    return map_x0(denoiser, guided)


def clip_views(
    images: Float[Array, "b h w 3"], size: int, cutouts: int, t: Scalar
) -> Float[Array, "k {size} {size} 3"]:
    """Return CLIP's inputs for images in [-1, 1]: resized, or `cutouts` crops of each.

    Crops depend on the time only, so that an image does not depend on its index in the batch.
    """
    b, height, width, _ = images.shape
    if not cutouts:
        whole = (height, width) == (size, size)
        return images if whole else jax.image.resize(images, (b, size, size, 3), "bilinear")
    key = jax.random.fold_in(jax.random.key(0), (t * 2**20).astype(jnp.int32))
    samples = jax.random.uniform(key, (cutouts, 3))
    sides = min(height, width) * (_SMALLEST_CUTOUT + (1 - _SMALLEST_CUTOUT) * samples[:, 0])

    def cut(side: Scalar, place: Float[Array, " 2"]) -> Float[Array, "b s s 3"]:
        start = place * (jnp.array([height, width]) - side)
        scale = jnp.broadcast_to(size / side, (2,))
        shape = (b, size, size, 3)
        return jax.image.scale_and_translate(
            images, shape, (1, 2), scale, -start * scale, "bilinear"
        )

    return jnp.concatenate([cut(sides[k], samples[k, 1:]) for k in range(cutouts)])
