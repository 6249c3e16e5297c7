"""AdamW and Muon with weight decay and gradient clipping, and learning-rate schedules.

A schedule is a frozen dataclass with one method, `factor(step, total_steps)`: the factor on
the learning rate at update `step`, counted from 0, which may be traced. It is a linear warm-up
times one of optax's schedules.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree
from optax.contrib import MuonDimensionNumbers, muon

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import BelowOne, Fraction, Natural, NotNegative, Positive, Range

StepCount = int | Int[Array, "..."]

_RMS_OF_ADAM = 0.2  # RMS of Adam's updates over the learning rate: 0.2 to 0.4 in practice


def _warmup(step: StepCount, warmup_steps: int) -> Float[Array, "..."]:
    """Return (step + 1) / warmup_steps, at most 1; unlike optax's warm-ups, not 0 at first."""
    return jnp.minimum(1.0, (jnp.float32(step) + 1) / max(warmup_steps, 1))


@checked
@dataclass(frozen=True, kw_only=True)
class ConstantLR:
    """Warm-up, then a factor of 1."""

    warmup_steps: Natural = 0

    def factor(self, step: StepCount, total_steps: int) -> Float[Array, "..."]:
        """The factor on the learning rate at update `step` of `total_steps`."""
        return _warmup(step, self.warmup_steps)


@checked
@dataclass(frozen=True, kw_only=True)
class CosineLR:
    """Warm-up, then half a cosine from 1 to `final` (Loshchilov & Hutter 2017, eq. 5)."""

    warmup_steps: Natural = 1000
    final: Fraction = 0.0

    def factor(self, step: StepCount, total_steps: int) -> Float[Array, "..."]:
        """The factor on the learning rate at update `step`; it reaches `final` at `total_steps`."""
        decay_steps = max(total_steps - self.warmup_steps, 1)
        decay = optax.cosine_decay_schedule(1.0, decay_steps, alpha=self.final)
        after_warmup = jnp.maximum(jnp.float32(step) - self.warmup_steps, 0)
        return _warmup(step, self.warmup_steps) * decay(after_warmup)


@checked
@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Warm-up, then a factor of 1, then a decay to `final` (Hu et al. 2024, section 4).

    Attributes:
      warmup_steps: updates of linear increase.
      decay_fraction: fraction of all updates, at the end, over which the factor decays.
      decay: shape of the decay over its progress p in [0, 1]: "linear" for 1 - p, or "sqrt" for
        1 - sqrt(p) (Hägele et al. 2024, section 3).
      final: factor at the end.
    """

    warmup_steps: Natural = 1000
    decay_fraction: Fraction = 0.2
    decay: Literal["linear", "sqrt"] = "sqrt"
    final: Fraction = 0.0

    def factor(self, step: StepCount, total_steps: int) -> Float[Array, "..."]:
        """The factor on the learning rate at update `step`; it reaches `final` at `total_steps`."""
        steps = max(round(self.decay_fraction * total_steps), 1)
        left = optax.linear_schedule(1.0, 0.0, steps, total_steps - steps)(jnp.float32(step))
        if self.decay == "sqrt":
            left = 1 - jnp.sqrt(1 - left)
        return _warmup(step, self.warmup_steps) * (self.final + (1 - self.final) * left)


def decayed(params: PyTree) -> PyTree[bool]:
    """Return the mask of parameters with weight decay: kernels of linear layers and convolutions.

    Biases, norms, embeddings, positions and CLIP's temperature are excluded. The name decides, not
    the rank, because stacked blocks give every bias a leading axis of depth.
    """

    def is_kernel(path, _) -> bool:
        names = (getattr(entry, "key", getattr(entry, "name", None)) for entry in path)
        return "kernel" in names

    return jax.tree_util.tree_map_with_path(is_kernel, params)


@checked
@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2) and clipping.

    Attributes:
      learning_rate: peak learning rate, which the schedule's factor multiplies.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      weight_decay: each update subtracts `learning rate x weight_decay` times each kernel.
      clip_norm: gradients with a larger global norm are scaled down to it (Pascanu et al. 2013,
        algorithm 1); None disables clipping.
      schedule: schedule of the learning rate.
    """

    learning_rate: Positive = 1e-4
    b1: BelowOne = 0.9
    b2: BelowOne = 0.95
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.01
    clip_norm: Annotated[float, Range(0, math.inf, "(]")] | None = 1.0
    schedule: ConstantLR | CosineLR | WarmupStableDecay = ConstantLR()

    def learning_rate_at(self, step: StepCount, total_steps: int) -> Float[Array, "..."]:
        """The learning rate of update `step`, counted from 0, of a run of `total_steps`."""
        return self.learning_rate * self.schedule.factor(step, total_steps)

    def build(self, total_steps: int) -> optax.GradientTransformation:
        """Build the gradient transformation for a run of `total_steps` updates."""
        step = self._step(lambda count: self.learning_rate_at(jnp.asarray(count), total_steps))
        if self.clip_norm is None:
            return step
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), step)

    def _step(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(
            learning_rate,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=decayed,
        )


@checked
@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Muon for the kernels, NAdam for the rest (Jordan et al. 2024; Liu et al. 2025, algorithm 1).

    The momentum of each kernel's gradient is orthogonalised and scaled to the RMS of Adam's updates
    (Liu et al. 2025, eq. 4), so the learning rate and weight decay of `AdamW` carry over. A
    convolution is a matrix from all inputs of its window to its outputs; stacked blocks are updated
    separately.

    Attributes:
      momentum: decay of the mean of a kernel's gradients; `b1`, `b2` and `eps` apply to the rest.
    """

    momentum: BelowOne = 0.95

    def _step(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return muon(
            learning_rate,
            beta=self.momentum,
            weight_decay=self.weight_decay,
            adam_b1=self.b1,
            adam_b2=self.b2,
            eps=self.eps,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=_RMS_OF_ADAM,
        )


def _matrices(params: PyTree) -> PyTree:
    """Return the axes of a kernel that form a matrix's rows and columns; None for others."""

    def matrix(kernel: bool, leaf: Array) -> MuonDimensionNumbers | None:
        first = leaf.ndim % 2  # linear layers have two axes, convolutions four, stacked ones more
        rows = tuple(range(first, leaf.ndim - 1))
        return MuonDimensionNumbers(rows, leaf.ndim - 1) if kernel and rows else None

    return jax.tree.map(matrix, decayed(params), params)
