"""Consistency distillation: train a student to follow a guided teacher in few, long steps.

The probability-flow ODE of x_t = alpha x0 + sigma eps is d(x / sigma) = D(x, t) d lam, with
lam = alpha / sigma and the teacher's denoiser D. From time t to s it moves x_t to

    x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) F            (1)

where F(x_t, t) is the mean of D over lam along the path. The student predicts F, as if it were x0:
DDIM (Song et al. 2021, eq. 12) with the student is exact in a single step from t to s. The target
of the student follows the same path in DDIM steps of the teacher, from t = t_0 by t_1 ... to
t_k = u, and in a step of the student's average from u to s:

    F(x_t, t) = sum_j (w_(j+1) - w_j) D(x_j, t_j) + (1 - w_k) F(x_u, u)
    w_j = (lam_j - lam_t) / (lam_s - lam_t)                                            (2)

At u = s, w_k is 1 and the target is the teacher's alone, which is the boundary condition.
"""

import itertools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Positive
from jaxdiff.diffusion.objectives import Conditioning, LossInputs, LossOutputs, Objective, Predictor
from jaxdiff.diffusion.process import Images, add_noise, over_images, to_x0_eps
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.diffusion.time_grids import AnyGrid, TimeGrid
from jaxdiff.diffusion.time_sampling import Uniform
from jaxdiff.errors import UserError

Times = Float[Array, " b"]


@checked
@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation(Objective):
    """Error of the student's F against eq. 2, with the student's average in the place of F(x_u, u).

    With one segment all paths end at t = 0: a latent consistency model (Luo et al. 2023,
    arXiv 2310.04378), sampled by `LCM`. With more segments, a path ends where its segment does:
    multistep consistency (Heek et al. 2024, arXiv 2403.06807), sampled by `DDIM` in as many steps
    on the same grid. With `segments` equal to `steps`, the teacher alone makes the target, and the
    student learns only the times at which it is sampled. The student learns the teacher's guidance
    and needs none of its own.

    Attributes:
      grid: the times t and u, and in finer steps those of the teacher. A student with several
        segments is sampled on the same grid, which is a `TimeGrid` as a rule.
      steps: number of steps of the grid; u is the next time after t.
      segments: parts of equal numbers of steps.
      teacher_steps: DDIM steps of the teacher from t to u.
      guidance_scale: guidance scale of the teacher; 1 distils the conditional model.
      huber: c of the pseudo-Huber loss sqrt(error^2 + c^2) - c of Luo et al. (0.001), for each
        element; None is the squared error.

    Raises:
      UserError: a number out of range, or `steps` is not a multiple of `segments`.
    """

    uses_uncond = True
    uses_teacher = True
    uses_ema = True
    by_row = True

    grid: AnyGrid = field(default_factory=TimeGrid)
    steps: Count = 24
    segments: Count = 4
    teacher_steps: Count = 1
    guidance_scale: float = 3.0
    huber: Positive | None = None

    def __post_init__(self):
        if self.steps % self.segments:
            raise UserError(
                f"ConsistencyDistillation.steps is {self.steps} and segments {self.segments}: "
                "expected a multiple of segments; change one of them."
            )

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Add noise to x0 at sampled times t, and compare the student with eq. 2.

        The noise of an image depends only on its key, its time also on the size of the batch.
        """
        x0 = inputs.x0.astype(jnp.float32)
        time_keys, noise_keys = inputs.keys.split()
        num_tokens = inputs.num_tokens or x0.shape[1] * x0.shape[2]
        times, s = self.times(time_keys, inputs.max_t, num_tokens)
        t = times[0]
        x_t = add_noise(inputs.schedule, x0, noise_keys.normal(*x0.shape[1:]), t)
        target = jax.lax.stop_gradient(self._target(inputs, x_t, times, s))
        error = _x0(inputs, inputs.model, x_t, t, inputs.cond) - target
        loss = jnp.mean(self._penalty(error), axis=(1, 2, 3))
        if inputs.row_weights is not None:
            loss = inputs.row_weights * loss
        return LossOutputs(loss, t, {}, inputs.state)

    def times(
        self, keys: RowKeys, max_t: float | Float[Array, ""], num_tokens: int
    ) -> tuple[list[Times], Times]:
        """Sample t, uniform in the steps of the grid up to max_t.

        Returns:
          t_0 ... t_k and s of eq. 2.
        """
        steps, k = self.steps, self.teacher_steps
        fine = self.grid(jnp.arange(steps * k + 1), steps * k, num_tokens).astype(jnp.float32)
        first = jnp.minimum(jnp.sum(fine[:-1:k] > max_t), steps - 1)
        uniform = Uniform()(keys.key, keys.count, num_tokens)[keys.rows]
        step = first + jnp.floor(uniform * (steps - first)).astype(jnp.int32)
        per_segment = steps // self.segments
        end = (step // per_segment + 1) * per_segment
        return [fine[step * k + j] for j in range(k + 1)], fine[end * k]

    def _target(self, inputs: LossInputs, x: Images, times: list[Times], s: Times) -> Images:
        """Return eq. 2 for x_t = x."""
        assert inputs.teacher is not None
        assert inputs.ema is not None
        schedule, t, total = inputs.schedule, times[0], jnp.zeros_like(x)
        before = jnp.zeros_like(t)
        for now, ahead in itertools.pairwise(times):
            x0 = _x0(inputs, inputs.teacher, x, now, inputs.cond)
            if self.guidance_scale != 1:
                uncond = _x0(inputs, inputs.teacher, x, now, inputs.uncond)
                x0 = uncond + self.guidance_scale * (x0 - uncond)
            weight = path_weight(schedule, t, ahead, s)
            total = total + over_images(weight - before) * x0
            x, before = move(schedule, x, x0, now, ahead), weight
        if self.segments == self.steps:
            return total
        rest = over_images(1 - before)
        last = _x0(inputs, inputs.ema, x, times[-1], inputs.cond)
        return jnp.where(rest == 0, total, total + rest * last)  # there is no F at t = 0

    def _penalty(self, error: Images) -> Images:
        if self.huber is None:
            return error**2
        return jnp.sqrt(error**2 + self.huber**2) - self.huber


def _x0(inputs: LossInputs, model: Predictor, x: Images, t: Times, cond: Conditioning) -> Images:
    alpha, sigma = inputs.schedule.alpha(t), inputs.schedule.sigma(t)
    output = model(x, t, cond).astype(jnp.float32)
    return to_x0_eps(inputs.prediction, output, x, alpha, sigma)[0]


def move(schedule: Schedule, x_t: Images, x0: Images, t: Times, s: Times) -> Images:
    """Return x_s of eq. 1, DDIM from t > 0 to s."""
    shrink = schedule.sigma(s) / schedule.sigma(t)
    scale = schedule.alpha(s) - schedule.alpha(t) * shrink
    return over_images(shrink) * x_t + over_images(scale) * x0


def path_weight(schedule: Schedule, t: Times, u: Times, s: Times) -> Times:
    """Return w of eq. 2 for t > u >= s: exactly 1 at u = s, and 0 for u > s = 0."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    near = schedule.alpha(u) * sigma - alpha * schedule.sigma(u)  # (lam_u - lam_t) sigma sigma_u
    far = schedule.alpha(s) * sigma - alpha * schedule.sigma(s)
    ratio = schedule.sigma(s) / jnp.where(u == s, 1.0, schedule.sigma(u))
    return jnp.where(u == s, 1.0, ratio * near / far)
