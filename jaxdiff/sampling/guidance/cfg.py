"""Classifier-free guidance: a denoiser (x_t, t) -> x0 with guidance toward a prompt.

Classifier-free guidance (Ho & Salimans 2022, eq. 6, with w + 1 = guidance_scale):

    guided = cond + (guidance_scale - 1) (cond - uncond)                           (1)

The weights sum to 1, and every prediction type is affine in x0 for a given x_t, so (1) holds for
all of them. Here it is applied to x0. For several prompts with weights (Liu et al. 2022, composable
diffusion, eq. 11),

    cond = uncond + sum_i weight_i (cond_i - uncond)                               (2)

and autoguidance (Karras et al. 2024, eq. 3, with w = guide_scale) by a worse model's estimate
`guide` for the same prompts adds (guide_scale - 1) (cond - guide) to (1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.process import Images, Prediction, to_x0_eps
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.sampling.feature_cache import (
    AnyCache,
    CacheState,
    SplitNetwork,
    evaluate_cached,
    init_cache,
)
from jaxdiff.sampling.guidance.cfg_zero import zero_velocity_x0
from jaxdiff.sampling.guidance.guidance import Estimates, Guidance
from jaxdiff.sampling.guidance.thresholds import Threshold
from jaxdiff.sampling.solver import Scalar, State, StatefulDenoiser

Cond = Any  # an opaque tree of arrays [b, ...]: the network's inputs beside x_t and t
ConditionedNetwork = Callable[[Images, Float[Array, " b"], Cond], Images]  # -> prediction


class ComposedPrompts(NamedTuple):
    """The prompts of eq. 2 after the first, and the weights of all of them.

    Attributes:
      conds: a tree of arrays [k, b, ...].
      weights: of the first prompt, then of these.
    """

    conds: Cond
    weights: Float[Array, "b k+1"]


class GuideModel(NamedTuple):
    """The worse model of autoguidance, given the same prompts, and the scale w."""

    model: "ConditionedModel"
    scale: Float[Array, ""]


@dataclass(frozen=True, kw_only=True)
class ConditionedModel:
    """A network with the conditioning of b prompts and b negative prompts.

    Attributes:
      network: called with as many images and times as conditionings, b or 2 b.
      prediction: type of its prediction.
      schedule: of its noise.
      cond: of the prompts.
      uncond: of the negative prompts; a tree of the same structure.
      composed: further prompts, if any; always evaluated in full.
      cache: of the network's features, which is then a `SplitNetwork`.
    """

    network: ConditionedNetwork
    prediction: Prediction
    schedule: Schedule
    cond: Cond
    uncond: Cond
    composed: ComposedPrompts | None = None
    cache: AnyCache | None = None

    def init_state(self, x: Images) -> State:
        """Return the state of the cache before the first step; () without one."""
        if self.cache is None:
            return ()
        assert isinstance(self.network, SplitNetwork)
        twice = jnp.concatenate([x, x])
        return init_cache(self.cache, self.network, twice, jnp.ones(len(twice)), self._conds())

    def conditional(self, x: Images, t: Scalar, state: State = ()) -> tuple[Images, State]:
        """Estimate x0 given the prompts; also return the next state of the cache."""
        if self.composed is None:
            return self._x0(x, t, self.cond, state)
        (cond, _), state = self.both(x, t, state)
        return cond, state

    def both(self, x: Images, t: Scalar, state: State = ()) -> tuple[tuple[Images, Images], State]:
        """Estimate x0 given the prompts, and given the negative prompts, in one call."""
        estimates, state = self._x0(jnp.concatenate([x, x]), t, self._conds(), state)
        cond, uncond = jnp.split(estimates, 2)
        if self.composed is None:
            return (cond, uncond), state
        # Sequentially: an image's bits do not depend on the number of prompts.
        weights = self.composed.weights.T[..., None, None, None]
        others = jax.lax.map(lambda cond: self._x0(x, t, cond, ())[0], self.composed.conds)
        composed = cond + (weights[0] - 1) * (cond - uncond)
        return (composed + jnp.sum(weights[1:] * (others - uncond), axis=0), uncond), state

    def _conds(self) -> Cond:
        return jax.tree.map(lambda *both: jnp.concatenate(both), self.cond, self.uncond)

    def _x0(self, x: Images, t: Scalar, cond: Cond, state: State) -> tuple[Images, State]:
        if self.cache is None or not isinstance(state, CacheState):  # () for further prompts
            output = self.network(x, jnp.broadcast_to(t, (len(x),)), cond)
        else:
            assert isinstance(self.network, SplitNetwork)
            images = len(jax.tree.leaves(self.cond)[0])
            output, rows = evaluate_cached(
                self.cache, self.network, x, t, cond, state.rows(len(x)), images
            )
            state = state.replace_rows(rows)
        output = output.astype(x.dtype)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return to_x0_eps(self.prediction, output, x, alpha, sigma)[0], state


def guided_denoiser(
    model: ConditionedModel,
    guidance: Guidance,
    guidance_scale: Float[Array, " b"],
    *,
    threshold: Threshold | None = None,
    guide: GuideModel | None = None,
    zero_init_until: Scalar | None = None,
    classifier_free: bool = True,
) -> StatefulDenoiser:
    """Return a denoiser of b images, guided by eq. 1.

    Args:
      model: the network and its conditioning.
      guidance: options of classifier-free guidance.
      guidance_scale: may be traced; at 1 the result is the conditional model's, at 0 that of the
        negative prompts.
      threshold: keeps estimates of x0 in range.
      guide: the model of autoguidance.
      zero_init_until: above this time the velocity is 0, for `CFGZeroStar.zero_steps`.
      classifier_free: False evaluates the network for the prompts alone, at half of the cost.
    """
    low, high = guidance.active_interval
    schedule = model.schedule

    def combined(x: Images, t: Scalar, states: State) -> tuple[Images, Images, State]:
        """Return the guided x0, the conditional one, and the next states."""
        state, cached = states
        if not classifier_free:
            cond, cached = model.conditional(x, t, cached)
            return cond, cond, (state, cached)
        (cond, uncond), cached = model.both(x, t, cached)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        estimates = Estimates(cond, uncond, x, t, alpha, sigma, model.prediction)
        if guidance.rule is not None:
            x0, state = guidance.rule.combine(estimates, guidance_scale, state)
        else:
            delta, state = _delta(guidance, estimates, state)
            # From cond, not from uncond: at scale 1 this is cond to the last bit.
            x0 = cond + (guidance_scale - 1).reshape(-1, 1, 1, 1) * delta
        return x0, cond, (state, cached)

    def guided(x: Images, t: Scalar, states: State) -> tuple[Images, State]:
        x0, cond, states = combined(x, t, states)
        if guide is not None:
            x0 = x0 + (guide.scale - 1) * (cond - guide.model.conditional(x, t)[0])
        return _rescaled(guidance.rescale_fraction, x0, cond), states

    def unguided(x: Images, t: Scalar, states: State) -> tuple[Images, State]:
        state, cached = states
        x0, cached = model.conditional(x, t, cached)
        return x0, (state, cached)

    def estimate(x: Images, t: Scalar, state: State) -> tuple[Images, State]:
        if (low, high) == (0, 1):
            x0, state = guided(x, t, state)
        else:
            x0, state = jax.lax.cond((low <= t) & (t <= high), guided, unguided, x, t, state)
        return x0 if threshold is None else threshold(x0), state

    def zero_velocity(x: Images, t: Scalar, state: State) -> tuple[Images, State]:
        return zero_velocity_x0(x, schedule.alpha(t), schedule.sigma(t)), state

    def denoise(x: Images, t: Scalar, state: State) -> tuple[Images, State]:
        if zero_init_until is None:
            return estimate(x, t, state)
        return jax.lax.cond(t > zero_init_until, zero_velocity, estimate, x, t, state)

    return StatefulDenoiser(
        denoise=denoise, init_state=lambda x: (_init_state(guidance, x), model.init_state(x))
    )


def _init_state(guidance: Guidance, x: Images) -> State:
    if guidance.rule is not None:
        return guidance.rule.init_state(x)
    return jnp.zeros_like(x) if guidance.has_state else ()


def _delta(guidance: Guidance, estimates: Estimates, state: State) -> tuple[Images, State]:
    """Return the factor of (guidance_scale - 1) in eq. 1, and the next state."""
    cond, uncond, x, _, alpha, sigma, prediction = estimates
    apg = guidance.apg
    if guidance.cfg_zero_star is not None:
        uncond = guidance.cfg_zero_star.optimized(cond, uncond, x, alpha, sigma, prediction)
    delta = cond - uncond
    if apg is None:
        return delta, state
    if apg.momentum:
        delta = state = delta + apg.momentum * state
    return apg.project(delta, cond), state


def _rescaled(rescale: float, x0: Images, cond: Images) -> Images:
    """Take the standard deviation of x0 back to that of `cond` by a fraction, image by image."""
    pixels = (1, 2, 3)
    if rescale == 0:
        return x0
    ratio = jnp.std(cond, pixels, keepdims=True) / jnp.std(x0, pixels, keepdims=True)
    return x0 * (1 + rescale * (ratio - 1))
