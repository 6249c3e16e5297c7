"""Training objectives: the loss of a batch.

    loss = w_s(log_snr(t)) mean((prediction_s - target_s)^2),  s the space of the loss   (1)

An `Objective` may also use a frozen teacher, the model's moving average, a second time and a state
that is carried from step to step, for distillation and two-time objectives.
"""

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import NotNegative, Positive
from jaxdiff.diffusion.losses import AnyWeighting, UniformWeighting
from jaxdiff.diffusion.process import Images, Prediction, add_noise, from_x0_eps, to_x0_eps
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.diffusion.time_sampling import AnyTimeSampler, Uniform

Conditioning = Any  # a tree of arrays [b, ...]


@runtime_checkable
class Predictor(Protocol):
    """A model with its parameters: (x_t, t, cond) to a prediction of the shape of x_t.

    `next_t` is the second time of two-time models; None for others.
    """

    def __call__(
        self,
        x_t: Images,
        t: Float[Array, " b"],
        cond: Conditioning,
        next_t: Float[Array, " b"] | None = None,
    ) -> Images:
        """Evaluate the model at times t."""
        ...


class LossInputs(NamedTuple):
    """Inputs of an objective.

    Attributes:
      model: the model in training.
      prediction: type of its prediction.
      schedule: of the noise.
      x0: images or latents, float32.
      cond: conditioning of the captions.
      keys: of the rows in this step.
      max_t: greatest time, set by a noise curriculum.
      uncond: conditioning of the absent prompt; None unless `Objective.uses_uncond`.
      teacher: the frozen pretrained model; None unless `Objective.uses_teacher`.
      ema: the model with its moving average; None unless `Objective.uses_ema`.
      state: of the objective.
      row_weights: weights of the images; None for equal ones.
      num_tokens: image tokens of the network, for time samplers that shift with the size; None
        for one per position of x0.
    """

    model: Predictor
    prediction: Prediction
    schedule: Schedule
    x0: Images
    cond: Conditioning
    keys: RowKeys
    max_t: float | Float[Array, ""] = 1.0
    uncond: Conditioning = None
    teacher: Predictor | None = None
    ema: Predictor | None = None
    state: Any = ()
    row_weights: Float[Array, " b"] | None = None
    num_tokens: int | None = None


class LossOutputs(NamedTuple):
    """The loss of each image.

    Attributes:
      loss: weighted, float32.
      t: times, in [0, 1].
      metrics: scalars to log beside the loss.
      state: for the next step.
    """

    loss: Float[Array, " b"]
    t: Float[Array, " b"]
    metrics: Mapping[str, Any]
    state: Any


class Objective(abc.ABC):
    """Interface of objectives; one's own is a frozen dataclass that inherits it.

    Attributes:
      uses_uncond, uses_teacher, uses_ema: whether `LossInputs` has these fields.
      by_row: whether the loss of an image is independent of the others, metrics are means over the
        images, and the next state is independent of them.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # of those that inherit it

    uses_uncond = False
    uses_teacher = False
    uses_ema = False
    by_row = False

    def init_state(self) -> Any:
        """Return the state at the first step, a tree of arrays."""
        return ()

    @abc.abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Return the loss of each image."""


@checked
@dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """Squared error of the prediction at sampled times, eq. 1.

    JiT (Li & He 2025, arXiv 2511.13720) is prediction="x0" with loss_space="velocity".

    Attributes:
      loss_space: the space of the loss; None is that of the prediction.
      times: distribution of the times.
      weighting: weight of the loss, by log_snr.
      floor: least sigma and alpha by which an error in x0 or eps is divided when it is converted to
        another space (JiT: 0.05); it bounds the weights at the ends.
      noise_offset: standard deviation of additional noise that is constant over the pixels of a
        channel (Guttenberg 2023, "Diffusion with offset noise": 0.1), for dark and bright images.

    Raises:
      UserError: floor is not positive, or noise_offset is negative.
    """

    by_row = True

    loss_space: Prediction | None = None
    times: AnyTimeSampler = field(default_factory=Uniform)
    weighting: AnyWeighting = field(default_factory=UniformWeighting)
    floor: Positive = 0.05
    noise_offset: NotNegative = 0.0

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Add noise to x0 at sampled times, predict, and weight the error.

        The noise of an image depends only on its key, its time also on the size of the batch.
        """
        x0 = inputs.x0.astype(jnp.float32)
        time_keys, noise_keys = inputs.keys.split()
        num_tokens = inputs.num_tokens or x0.shape[1] * x0.shape[2]
        t = self.times(time_keys.key, time_keys.count, num_tokens)[time_keys.rows] * inputs.max_t
        eps = self._noise(noise_keys, x0)
        x_t = add_noise(inputs.schedule, x0, eps, t)
        output = inputs.model(x_t, t, inputs.cond).astype(jnp.float32)
        loss = self.weighted_error(inputs.prediction, inputs.schedule, output, x0, eps, t)
        if inputs.row_weights is not None:
            loss = inputs.row_weights * loss
        return LossOutputs(loss, t, {}, inputs.state)

    def _noise(self, keys: RowKeys, x0: Images) -> Images:
        eps = keys.normal(*x0.shape[1:])
        if self.noise_offset:
            offset_keys = jax.vmap(jax.random.fold_in, (0, None))(keys.by_row(), 1)
            shape = (1, 1, x0.shape[-1])
            offset = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(offset_keys)
            eps = eps + self.noise_offset * offset
        return eps

    def weighted_error(
        self,
        prediction: Prediction,
        schedule: Schedule,
        output: Images,
        x0: Images,
        eps: Images,
        t: Float[Array, " b"],
    ) -> Float[Array, " b"]:
        """Return eq. 1 for each image, given the network's output for x_t."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        space = self.loss_space or prediction
        error = output - from_x0_eps(prediction, x0, eps, alpha, sigma)
        if space != prediction:
            # Affine conversions map errors like outputs with x_t = 0: this avoids cancellation, and
            # the floor applies to target and prediction alike.
            errors = to_x0_eps(
                prediction, error, jnp.zeros_like(error), alpha, sigma, floor=self.floor
            )
            error = from_x0_eps(space, *errors, alpha, sigma)
        weight = self.weighting(schedule.log_snr(t), space)
        return weight * jnp.mean(error**2, axis=(1, 2, 3))
