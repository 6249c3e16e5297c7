"""Guidance: turns networks into a denoiser, (x_t, t) -> x0, that follows a prompt.

Classifier-free guidance (Ho & Salimans 2022, eq. 6, its w + 1 being guidance_scale):

    guided = cond + (guidance_scale - 1) (cond - uncond)                           (1)

The weights sum to 1, and every prediction type is affine in x0 for a given x_t; so it does not
matter in which of them (1) is taken. Here it is x0. Of several prompts with weights (Liu et al.
2022, composable diffusion, eq. 11),

    cond = uncond + sum_i weight_i (cond_i - uncond)                               (2)

and away from what a weaker model of the same thing makes of the same prompt (Karras et al. 2024,
autoguidance, eq. 3, its w being weak_scale), `+ (weak_scale - 1) (cond - weak)` is added to (1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.process import Images, Prediction, to_x0_eps
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.errors import UserError
from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar, still
from jaxdiff.sampling.solvers_ode import Memory, Scalar
from jaxdiff.sampling.stateful_denoiser import AnyDenoise, Remembering

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
class Guidance:
    """How classifier-free guidance acts; by how much is the guidance scale's affair.

    Attributes:
      interval: times of t, from 0 to 1, at which it acts. It harms at the highest noise and is idle
        at the lowest (Kynkäänniemi et al. 2024); elsewhere the network is told of the prompts
        alone, which is half of the work.
      rescale: how far, from 0 to 1, a guided x0 is taken back to the standard deviation of the
        conditional one (Lin et al. 2023, eq. 15-16), image by image.
      apg: what is done to the difference that the prompt makes.
      zero_star: what is done where a flow model is unsure of itself.

    Raises:
      UserError: interval or rescale outside [0, 1].
    """

    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    apg: APG | None = None
    zero_star: CFGZeroStar | None = None

    def __post_init__(self):
        low, high = self.interval
        if not 0 <= low <= high <= 1 or not 0 <= self.rescale <= 1:
            raise UserError(
                f"Guidance got interval={self.interval}, rescale={self.rescale}; give an "
                "interval (low, high) of times and a rescale, all in [0, 1]."
            )

    @property
    def remembers(self) -> bool:
        """Whether a step depends on the guidance of the one before."""
        return self.apg is not None and self.apg.momentum != 0

    def check_steps(self, num_steps: int) -> None:
        """Raises `UserError` if none of so many steps would be taken."""
        if self.zero_star and self.zero_star.zero_steps >= num_steps:
            raise UserError(
                f"zero_star.zero_steps is {self.zero_star.zero_steps} of {num_steps} steps: leave "
                "at least one that is taken."
            )


class Further(NamedTuple):
    """The prompts of eq. 2 after the first, and the weights of all of them."""

    texts: Text  # a tree of arrays [k, b, ...]
    weights: Float[Array, "b k+1"]


class Weak(NamedTuple):
    """A weaker model, told of the same prompts."""

    told: "Told"
    scale: Float[Array, ""]


@dataclass(frozen=True, kw_only=True)
class Told:
    """A network that is told of b prompts, and of what to steer away from.

    Attributes:
      network: called with as many images and times as texts, one or two for each prompt.
      prediction: what it says.
      schedule: of its noise.
      cond: the prompts' features.
      uncond: those of the negative prompts, or of the empty one; a tree of the same structure.
      further: what the prompts are composed with.
    """

    network: Network
    prediction: Prediction
    schedule: Schedule
    cond: Text
    uncond: Text
    further: Further | None = None

    def conditional(self, x: Images, t: Scalar) -> Images:
        """x0 by the prompts."""
        return self._x0(x, t, self.cond) if self.further is None else self.both(x, t)[0]

    def both(self, x: Images, t: Scalar) -> tuple[Images, Images]:
        """x0 by the prompts and without them; one call of the network, cond first, serves both."""
        text = jax.tree.map(lambda *both: jnp.concatenate(both), self.cond, self.uncond)
        cond, uncond = jnp.split(self._x0(jnp.concatenate([x, x]), t, text), 2)
        if self.further is None:
            return cond, uncond
        # One after the other: an image has the same bits among any number of them.
        weights = self.further.weights.T[..., None, None, None]
        others = jax.lax.map(lambda text: self._x0(x, t, text), self.further.texts)
        composed = cond + (weights[0] - 1) * (cond - uncond)
        return composed + jnp.sum(weights[1:] * (others - uncond), axis=0), uncond

    def _x0(self, x: Images, t: Scalar, text: Text) -> Images:
        output = self.network(x, jnp.broadcast_to(t, (len(x),)), text).astype(x.dtype)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return to_x0_eps(self.prediction, output, x, alpha, sigma)[0]


@dataclass(frozen=True, kw_only=True)
class ClassifierFree:
    """Guidance by the difference that the prompt makes, eq. 1.

    Attributes:
      guidance: how it acts.
      threshold: keeps estimates of x0 in range.
    """

    guidance: Guidance = Guidance()
    threshold: Threshold | None = None

    def denoiser(
        self,
        told: Told,
        guidance_scale: Float[Array, " b"],
        *,
        weak: Weak | None = None,
        still_above: Scalar | None = None,
    ) -> AnyDenoise:
        """A denoiser for b prompts.

        Args:
          told: the network and what it is told.
          guidance_scale: may be traced; at 1 the result is the conditional model's, at 0 the
            negative prompt's.
          weak: what to steer away from as well.
          still_above: the time above which no step is taken, for `CFGZeroStar.zero_steps`.

        Returns:
          One that remembers, if there is a momentum.
        """
        low, high = self.guidance.interval
        schedule = told.schedule

        def guided(x: Images, t: Scalar, memory: Memory) -> tuple[Images, Memory]:
            cond, uncond = told.both(x, t)
            apart, memory = self._difference(told, cond, uncond, x, t, memory)
            # From cond, not from uncond: at scale 1 this is cond to the last bit.
            x0 = cond + (guidance_scale - 1).reshape(-1, 1, 1, 1) * apart
            if weak is not None:
                x0 = x0 + (weak.scale - 1) * (cond - weak.told.conditional(x, t))
            return self._rescaled(x0, cond), memory

        def unguided(x: Images, t: Scalar, memory: Memory) -> tuple[Images, Memory]:
            return told.conditional(x, t), memory

        def moving(x: Images, t: Scalar, memory: Memory) -> tuple[Images, Memory]:
            if (low, high) == (0, 1):
                x0, memory = guided(x, t, memory)
            else:
                inside = (low <= t) & (t <= high)
                x0, memory = jax.lax.cond(inside, guided, unguided, x, t, memory)
            return x0 if self.threshold is None else self.threshold(x0), memory

        def at_rest(x: Images, t: Scalar, memory: Memory) -> tuple[Images, Memory]:
            return still(x, schedule.alpha(t), schedule.sigma(t)), memory

        def estimate(x: Images, t: Scalar, memory: Memory) -> tuple[Images, Memory]:
            if still_above is None:
                return moving(x, t, memory)
            return jax.lax.cond(t > still_above, at_rest, moving, x, t, memory)

        if self.guidance.remembers:
            return Remembering(init=jnp.zeros_like, estimate=estimate)
        return lambda x, t: estimate(x, t, ())[0]

    def _difference(
        self, told: Told, cond: Images, uncond: Images, x: Images, t: Scalar, memory: Memory
    ) -> tuple[Images, Memory]:
        """What the guidance scale less 1 is multiplied by."""
        apg, zero_star = self.guidance.apg, self.guidance.zero_star
        if zero_star is not None:
            alpha, sigma = told.schedule.alpha(t), told.schedule.sigma(t)
            uncond = zero_star.optimized(cond, uncond, x, alpha, sigma, told.prediction)
        apart = cond - uncond
        if apg is None:
            return apart, memory
        if apg.momentum:
            apart = memory = apart + apg.momentum * memory
        return apg.projected(apart, cond), memory

    def _rescaled(self, x0: Images, cond: Images) -> Images:
        rescale, pixels = self.guidance.rescale, (1, 2, 3)
        if rescale == 0:
            return x0
        size = jnp.std(cond, pixels, keepdims=True) / jnp.std(x0, pixels, keepdims=True)
        return x0 * (1 + rescale * (size - 1))
