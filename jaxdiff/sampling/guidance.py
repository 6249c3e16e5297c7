"""Guidance: turns a network into a denoiser, (x_t, t) -> x0, that follows a prompt.

Classifier-free guidance (Ho & Salimans 2022, eq. 6, its w + 1 being guidance_scale):

    guided = uncond + guidance_scale (cond - uncond)                               (1)

The weights sum to 1, and every prediction type is affine in x0 for a given x_t; so it does not
matter in which of them (1) is taken. Here it is x0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.process import Images, Prediction, to_x0_eps
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.errors import UserError
from jaxdiff.sampling.solvers import Denoise, Scalar

Text = Any  # a tree of arrays [b, ...]: what the network knows of the prompts
Threshold = Callable[[Images], Images]  # keeps estimates of x0 where data are
Network = Callable[[Images, Float[Array, " b"], Text], Images]  # (x_t, t, text) -> prediction


@dataclass(frozen=True, kw_only=True)
class StaticThreshold:
    """Clips x0 to [-bound, bound]; pixels lie in [-1, 1].

    Raises:
        UserError: bound is not positive.
    """

    bound: float = 1.0

    def __post_init__(self):
        if not self.bound > 0:
            raise UserError(f"StaticThreshold.bound is {self.bound}; give a positive number.")

    def __call__(self, x0: Images) -> Images:
        """Clipped."""
        return jnp.clip(x0, -self.bound, self.bound)


@dataclass(frozen=True, kw_only=True)
class DynamicThreshold:
    """Clips each image at a quantile of |x0|, then scales it back to [-1, 1].

    Saharia et al. 2022, section 2.3: strong guidance then saturates no pixels. An image whose
    quantile is below 1 is only clipped.

    Raises:
        UserError: quantile outside (0, 1].
    """

    quantile: float = 0.995

    def __post_init__(self):
        if not 0 < self.quantile <= 1:
            raise UserError(f"DynamicThreshold.quantile is {self.quantile}; give one in (0, 1].")

    def __call__(self, x0: Images) -> Images:
        """Clipped and scaled, within [-1, 1]."""
        size = jnp.quantile(jnp.abs(x0), self.quantile, axis=(1, 2, 3), keepdims=True)
        size = jnp.maximum(size, 1.0)
        return jnp.clip(x0, -size, size) / size


@dataclass(frozen=True, kw_only=True)
class ClassifierFree:
    """Guidance by the difference that the prompt makes, eq. 1.

    Outside `interval` of t the scale is 1 (Kynkäänniemi et al. 2024): guidance harms at the highest
    noise and is idle at the lowest. `rescale` takes the guided x0 that far, from 0 to 1, back to
    the standard deviation of the conditional one (Lin et al. 2023, eq. 15-16), image by image.

    Raises:
        UserError: interval or rescale outside [0, 1].
    """

    prediction: Prediction
    schedule: Schedule
    threshold: Threshold | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __post_init__(self):
        low, high = self.interval
        if not 0 <= low <= high <= 1 or not 0 <= self.rescale <= 1:
            raise UserError(
                f"ClassifierFree got interval={self.interval}, rescale={self.rescale}; give an "
                "interval (low, high) of times and a rescale, all in [0, 1]."
            )

    def denoiser(
        self,
        network: Network,
        cond: Text,
        uncond: Text,
        guidance_scale: Float[Array, " b"],
    ) -> Denoise:
        """A denoiser for b prompts.

        cond are the prompts' features and uncond those of the negative prompts (or of the empty
        one), two trees of one structure. The network is called once on both, cond first, with
        images and times [2b]. guidance_scale may be traced; at 1 the result is the conditional
        model's, at 0 the negative prompt's.
        """
        text = jax.tree.map(lambda *both: jnp.concatenate(both), cond, uncond)

        def denoise(x: Images, t: Scalar) -> Images:
            batch = x.shape[0]
            twice = jnp.concatenate([x, x])
            output = network(twice, jnp.broadcast_to(t, (2 * batch,)), text)
            alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
            x0, _ = to_x0_eps(self.prediction, output.astype(x.dtype), twice, alpha, sigma)
            x0 = self._guide(x0[:batch], x0[batch:], t, guidance_scale)
            return x0 if self.threshold is None else self.threshold(x0)

        return denoise

    def _guide(self, cond: Images, uncond: Images, t: Scalar, scale: Float[Array, " b"]) -> Images:
        low, high = self.interval
        scale = jnp.where((low <= t) & (t <= high), scale, 1.0).reshape(-1, 1, 1, 1)
        # From cond, not from uncond: at scale 1 this is cond to the last bit.
        guided = cond + (scale - 1) * (cond - uncond)
        if self.rescale == 0:
            return guided
        pixels = (1, 2, 3)
        size = jnp.std(cond, pixels, keepdims=True) / jnp.std(guided, pixels, keepdims=True)
        return guided * (1 + self.rescale * (size - 1))
