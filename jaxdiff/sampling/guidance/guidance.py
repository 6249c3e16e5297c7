"""Guidance options other than the scale."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Fraction, Interval
from jaxdiff.diffusion.process import Images, Prediction
from jaxdiff.errors import UserError
from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.autoguidance import Autoguidance
from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.sampling.solver import Scalar, State


class Estimates(NamedTuple):
    """Inputs of a `GuidanceRule`.

    Attributes:
      cond: x0 given the prompts.
      uncond: x0 given the negative prompts.
      x: x_t.
      t: the time.
      alpha: of the schedule at t.
      sigma: likewise.
      prediction: type of the network's prediction.
    """

    cond: Images
    uncond: Images
    x: Images
    t: Scalar
    alpha: Scalar
    sigma: Scalar
    prediction: Prediction


@runtime_checkable
class GuidanceRule(Protocol):
    """Interface of rules that combine the two estimates of classifier-free guidance.

    A rule of your own is a frozen dataclass with these methods, passed as `Guidance(rule=...)`.
    """

    def init_state(self, x: Images) -> State:
        """Return the state before the first step; () for a rule without any."""
        ...

    def combine(
        self, estimates: Estimates, guidance_scale: Float[Array, " b"], state: State
    ) -> tuple[Images, State]:
        """Return the guided x0, and the next state."""
        ...


@checked
@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance options other than the scale; a field that is None inherits the model's.

    Attributes:
      interval: times in [0, 1] with classifier-free guidance. It is harmful at the highest noise
        and has no effect at the lowest (Kynkäänniemi et al. 2024). Other times evaluate only the
        conditional model, at half the cost.
      rescale: fraction in [0, 1] by which the standard deviation of a guided x0 is rescaled to that
        of the conditional one (Lin et al. 2023, eq. 15-16), per image.
      apg: adaptive projected guidance; `APG(eta=1)` disables a model's default.
      cfg_zero_star: for flow models; `CFGZeroStar(optimized_scale=False, zero_steps=0)` disables a
        model's default.
      rule: combines the two estimates instead of classifier-free guidance, `apg` and
        `cfg_zero_star.optimized_scale`.
      clip: CLIP guidance; a scale of 0 disables a model's default.
      guide: autoguidance; a scale of 1 disables a model's default.
      distilled: whether the network is trained to need no classifier-free guidance, in few steps
        or with the guidance scale as its input; it is then evaluated for the prompt alone.
      true_cfg_scale: scale of classifier-free guidance of a distilled network, in addition to what
        it was trained for; None does without.

    Raises:
      UserError: interval or rescale outside [0, 1].
    """

    interval: Annotated[tuple[float, float], Interval()] | None = None
    rescale: Fraction | None = None
    apg: APG | None = None
    cfg_zero_star: CFGZeroStar | None = None
    rule: GuidanceRule | None = None
    clip: ClipGuidance | None = None
    guide: Autoguidance | None = None
    distilled: bool | None = None
    true_cfg_scale: float | None = None

    def is_classifier_free(self, embeds: bool = False) -> bool:
        """Whether the network is evaluated for the negative prompt, too.

        Args:
          embeds: whether it reads the guidance scale.
        """
        return self.true_cfg_scale is not None or not (self.distilled or embeds)

    def at_scales(self, scales: Float[np.ndarray, " b"]) -> "Guidance":
        """Return these options for the scales of a batch.

        Where all are 1, the negative prompt has no effect and is not evaluated, but for a `rule`.
        """
        if self.rule is not None or (scales != 1).any():
            return self
        return dataclasses.replace(self, distilled=True, true_cfg_scale=None)

    def inherit(self, other: "Guidance") -> "Guidance":
        """Return these options, with another's in the place of those that are None."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(other, **{k: v for k, v in given.items() if v is not None})

    @property
    def active_interval(self) -> tuple[float, float]:
        """`interval`, by default all times."""
        return (0.0, 1.0) if self.interval is None else self.interval

    @property
    def rescale_fraction(self) -> float:
        """`rescale`, by default 0."""
        return self.rescale or 0.0

    @property
    def zero_steps(self) -> int:
        """Number of initial steps with velocity 0."""
        return self.cfg_zero_star.zero_steps if self.cfg_zero_star else 0

    @property
    def has_state(self) -> bool:
        """Whether a step depends on the guidance of earlier ones."""
        if self.rule is None:
            return self.apg is not None and self.apg.momentum != 0
        return bool(jax.tree.leaves(jax.eval_shape(self.rule.init_state, jnp.zeros((1, 8, 8, 1)))))

    def check_steps(self, num_steps: int) -> None:
        """Raise `UserError` if the velocity is 0 in all steps."""
        if self.zero_steps >= num_steps:
            raise UserError(
                f"cfg_zero_star.zero_steps is {self.zero_steps} of {num_steps} steps: expected "
                "fewer; increase num_steps, or lower zero_steps."
            )
