"""Feature caching: most steps of a run reuse what the deep part of a network returned before.

A network that supports it is split in three (`SplitNetwork`),

    prediction = finish(shallow(x_t, t), deep(shallow(x_t, t)))                    (1)

with the first block in `shallow`, and in `deep` all blocks but the first (of a U-Net, all but the
first and the last of its finest level: Ma et al. 2023, DeepCache). `shallow` and `finish` run at
every step. Steps that do not evaluate `deep` estimate its features F by a Taylor series in time,

    F(t) = sum_k F_k (t - t')^k / k!,   F_k = (F_(k-1) - earlier F_(k-1)) / (t' - t'')   (2)

where t' and t'' are the times of the last two evaluations (Liu et al. 2025, TaylorSeer, eq. 7).

An image does not depend on others of its batch. `TaylorSeer` chooses the steps by their number. The
steps of `FirstBlockCache` depend on the image: a batch evaluates `deep` if one of its images needs
it, and the others still use what they have cached.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Natural, Positive, Range
from jaxdiff.diffusion.process import Images
from jaxdiff.sampling.solver import Scalar

Features = Float[Array, "n ..."]  # n rows: images, or images with and without their prompts


class Shallow(NamedTuple):
    """The result of the shallow part of a network.

    Attributes:
      residual: what the first block added to its input.
      inputs: of the other two parts, a tree.
    """

    residual: Features
    inputs: Any


@runtime_checkable
class SplitNetwork(Protocol):
    """A network in three parts, eq. 1."""

    def shallow(self, x: Images, t: Float[Array, " n"], cond: Any) -> Shallow:
        """Embed the inputs and apply the first block."""
        ...

    def deep(self, inputs: Any) -> Features:
        """Return the features of the blocks that follow."""
        ...

    def finish(self, inputs: Any, features: Features) -> Images:
        """Return the prediction."""
        ...


class CacheState(NamedTuple):
    """What a cache carries from step to step.

    Attributes:
      step: number of steps before this one.
      evaluations: of `deep` by row; 0 if there are no features yet.
      t: time of the last one.
      residual: of the first block then; empty for rules that do not compare it.
      factors: F_0, F_1, ... of eq. 2.
    """

    step: Int[Array, ""]
    evaluations: Int[Array, " n"]
    t: Float[Array, " n"]
    residual: Features
    factors: tuple[Features, ...]

    def rows(self, count: int) -> "CacheState":
        """Return the first rows."""
        return CacheState(self.step, *jax.tree.map(lambda x: x[:count], self[1:]))

    def replace_rows(self, part: "CacheState") -> "CacheState":
        """Return these rows with the first ones replaced."""
        rows = jax.tree.map(lambda x, new: x.at[: len(new)].set(new), self[1:], part[1:])
        return CacheState(part.step, *rows)

    def predict(self, t: Scalar) -> Features:
        """Apply eq. 2."""
        offset = _like(t - self.t, self.factors[0])
        terms = (f * offset**k / math.factorial(k) for k, f in enumerate(self.factors))
        return sum(terms).astype(self.factors[0].dtype)  # type: ignore[union-attr]

    def update(self, t: Scalar, residual: Features, features: Features) -> "CacheState":
        """Return the state after an evaluation of `deep`."""
        elapsed = _like(t - self.t, features)
        factors = [features.astype(jnp.float32)]
        for k, before in enumerate(self.factors[:-1]):
            slope = (factors[k] - before) / jnp.where(elapsed == 0, 1, elapsed)
            known = (_like(self.evaluations, features) > k) & (elapsed != 0)
            factors.append(jnp.where(known, slope, 0))
        return CacheState(
            step=self.step,
            evaluations=self.evaluations + 1,
            t=jnp.full_like(self.t, t),
            residual=residual,
            factors=tuple(f.astype(features.dtype) for f in factors),
        )


def _like(values: Array, rows: Array) -> Array:
    """Append axes of length 1 to one value per row."""
    return values.reshape(-1, *(1,) * (rows.ndim - 1))


@checked
@dataclass(frozen=True, kw_only=True)
class TaylorSeer:
    """Evaluate the deep part of the network at every `interval`-th step (Liu et al. 2025).

    The steps are those of `diffusers.TaylorSeerCacheConfig`, which extrapolates over steps of equal
    length rather than over time.

    Attributes:
      interval: 2 skips every other step; 1 disables a model's default.
      warmup: number of first steps that evaluate all of the network.
      order: order of the series; 0 repeats the features of the last evaluation.
    """

    interval: Count = 3
    warmup: Natural = 3
    order: Annotated[int, Range(0, 3)] = 1

    def remember(self, residual: Features) -> Features:
        """Return nothing of the first block's residual."""
        return residual[:, :0]

    def stale(self, state: CacheState, residual: Features) -> Bool[Array, " n"]:
        """Whether this step evaluates."""
        since = state.step - self.warmup
        due = (since < 0) | ((since - 1) % self.interval == 0)
        return jnp.broadcast_to(due, state.t.shape)


@checked
@dataclass(frozen=True, kw_only=True)
class FirstBlockCache:
    """Evaluate the deep part of the network where the first block's residual has changed.

    `diffusers.FirstBlockCacheConfig`, decided for each image.

    Attributes:
      threshold: mean absolute change of the residual since the last evaluation, relative to its
        mean absolute value then, above which an image is evaluated.
    """

    threshold: Positive = 0.05
    order: ClassVar[int] = 0

    def remember(self, residual: Features) -> Features:
        """Return the residual."""
        return residual

    def stale(self, state: CacheState, residual: Features) -> Bool[Array, " n"]:
        """Whether an image is evaluated."""
        before = state.residual.astype(jnp.float32)
        axes = tuple(range(1, before.ndim))
        change = jnp.mean(jnp.abs(residual - before), axes)
        return change > self.threshold * jnp.mean(jnp.abs(before), axes)


AnyCache = TaylorSeer | FirstBlockCache


def init_cache(
    cache: AnyCache, network: SplitNetwork, x: Images, t: Float[Array, " n"], cond: Any
) -> CacheState:
    """Return the state before the first step, for rows of these shapes."""

    def parts() -> tuple[Features, Features]:
        shallow = network.shallow(x, t, cond)
        return cache.remember(shallow.residual), network.deep(shallow.inputs)

    residual, features = jax.tree.map(
        lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(parts)
    )
    return CacheState(
        step=jnp.zeros((), jnp.int32),
        evaluations=jnp.zeros(len(x), jnp.int32),
        t=jnp.zeros(len(x), x.dtype),
        residual=residual,
        factors=(features,) * (cache.order + 1),
    )


def evaluate_cached(
    cache: AnyCache,
    network: SplitNetwork,
    x: Images,
    t: Scalar,
    cond: Any,
    state: CacheState,
    num_images: int,
) -> tuple[Images, CacheState]:
    """Evaluate a network, or as much of it as its cache requires.

    Args:
      cache: the rule.
      network: to evaluate.
      x: x_t of all rows.
      t: the time.
      cond: of all rows.
      state: of the cache.
      num_images: rows i, i + num_images, ... belong to one image, and are evaluated together.

    Returns:
      The prediction, and the next state.
    """
    shallow = network.shallow(x, jnp.broadcast_to(t, (len(x),)), cond)
    stale = cache.stale(state, shallow.residual) | (state.evaluations == 0)
    stale = jnp.tile(stale.reshape(-1, num_images).any(axis=0), len(x) // num_images)

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(_like(stale, new), new, old)

    def evaluate(state: CacheState) -> tuple[Features, CacheState]:
        features = network.deep(shallow.inputs)
        updated = state.update(t, cache.remember(shallow.residual), features)
        rows = jax.tree.map(choose, updated[1:], state[1:])
        return choose(features, state.predict(t)), CacheState(state.step, *rows)

    def reuse(state: CacheState) -> tuple[Features, CacheState]:
        return state.predict(t), state

    features, state = jax.lax.cond(jnp.any(stale), evaluate, reuse, state)
    return network.finish(shallow.inputs, features), state._replace(step=state.step + 1)
