"""AdamW and Muon with weight decay and gradient clipping, and learning-rate schedules.

A schedule is a frozen dataclass with one method, `factor(step, total_steps)`: the factor on
the learning rate at update `step`, counted from 0, which may be traced. It is a linear warm-up
times one of optax's schedules.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree
from optax.contrib import MuonDimensionNumbers, muon

from jaxdiff.errors import UserError

StepCount = int | Int[Array, "..."]

_RMS_OF_ADAM = 0.2  # RMS of Adam's updates over the learning rate: 0.2 to 0.4 in practice


def _check_schedule(name: str, warmup_steps: int, **fractions: float) -> None:
    if warmup_steps < 0:
        raise UserError(f"{name}: warmup_steps must be 0 or more; got {warmup_steps}.")
    for field, value in fractions.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name}: {field} must be from 0 to 1; got {value}.")


def _warmup(step: StepCount, warmup_steps: int) -> Float[Array, "..."]:
    """Return (step + 1) / warmup_steps, at most 1; unlike optax's warm-ups, not 0 at first."""
    return jnp.minimum(1.0, (jnp.float32(step) + 1) / max(warmup_steps, 1))


@dataclass(frozen=True, kw_only=True)
class ConstantLR:
    """Warm-up, then a factor of 1."""

    warmup_steps: int = 0

    def __post_init__(self):
        _check_schedule("ConstantLR", self.warmup_steps)

    def factor(self, step: StepCount, total_steps: int) -> Float[Array, "..."]:
        """The factor on the learning rate at update `step` of `total_steps`."""
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class CosineLR:
    """Warm-up, then half a cosine from 1 to `final` (Loshchilov & Hutter 2017, eq. 5)."""

    warmup_steps: int = 1000
    final: float = 0.0

    def __post_init__(self):
        _check_schedule("CosineLR", self.warmup_steps, final=self.final)

    def factor(self, step: StepCount, total_steps: int) -> Float[Array, "..."]:
        """The factor on the learning rate at update `step`; it reaches `final` at `total_steps`."""
        decay_steps = max(total_steps - self.warmup_steps, 1)
        decay = optax.cosine_decay_schedule(1.0, decay_steps, alpha=self.final)
        after_warmup = jnp.maximum(jnp.float32(step) - self.warmup_steps, 0)
        return _warmup(step, self.warmup_steps) * decay(after_warmup)


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

    warmup_steps: int = 1000
    decay_fraction: float = 0.2
    decay: Literal["linear", "sqrt"] = "sqrt"
    final: float = 0.0

    def __post_init__(self):
        _check_schedule(
            "WarmupStableDecay",
            self.warmup_steps,
            decay_fraction=self.decay_fraction,
            final=self.final,
        )

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


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2) and clipping.

    Attributes:
      learning_rate: peak value; the schedule's factor multiplies it.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      weight_decay: each update subtracts `learning rate x weight_decay` times each kernel.
      clip_norm: gradients with a larger global norm are scaled down to it (Pascanu et al. 2013,
        algorithm 1); None disables clipping.
      schedule: of the learning rate.
    """

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    schedule: ConstantLR | CosineLR | WarmupStableDecay = ConstantLR()

    def __post_init__(self):
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.eps <= 0:
            raise UserError(
                f"optimizer: learning_rate and eps must be positive and weight_decay not negative; "
                f"got {self.learning_rate}, {self.eps} and {self.weight_decay}."
            )
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise UserError(f"optimizer: b1 and b2 must be in [0, 1); got {self.b1} and {self.b2}.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(
                "optimizer: clip_norm must be positive, or None to disable clipping; got "
                f"{self.clip_norm}."
            )

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

    momentum: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer: momentum must be in [0, 1); got {self.momentum}.")

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
