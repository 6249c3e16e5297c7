"""Time grids: at which times a sampler stands.

A grid is called as grid(i, num_steps) and gives the time before step i, so that the first step
starts at grid(0, num_steps) and the last one arrives at grid(num_steps, num_steps). Both may be
traced: another number of steps compiles nothing. Times fall from 1 (noise) to 0 (data).
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.diffusion.schedules import AnySchedule, Times, shift_time
from jaxdiff.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TimeGrid:
    """The times at which a sampler stands: (1 - i / num_steps)^rho, then shifted.

    rho = 1 is even. A larger rho takes shorter steps near the data, as Karras et al. 2022, eq. 5,
    does in sigma: where log_snr runs off to infinity even steps are too long for a multistep
    solver. A shift above 1 spends more of the steps on high noise, where large images are composed;
    give a network the shift of the times that it was trained on. For Stable Diffusion's schedule
    the even grid is the "trailing" one of Lin et al. 2023 (table 2), which starts at the last
    training step.

    Raises:
        UserError: shift is not positive, or rho is below 1.
    """

    shift: float = 1.0
    rho: float = 1.0

    def __post_init__(self):
        if not (self.shift > 0 and self.rho >= 1):
            raise UserError(
                f"TimeGrid got shift={self.shift}, rho={self.rho}; give a positive shift and a rho "
                "of at least 1."
            )

    def __call__(
        self, i: int | Int[Array, "*b"], num_steps: int | Int[Array, ""]
    ) -> Float[Array, "*b"]:
        """The time before step i of num_steps; both may be traced. It is 1 at 0, 0 at num_steps."""
        dtype = jnp.result_type(float)
        left = jnp.asarray(num_steps - i, dtype) / jnp.asarray(num_steps, dtype)
        return shift_time(left**self.rho, self.shift)


@dataclass(frozen=True, kw_only=True)
class TrainStepGrid:
    """diffusers' grids, which stand at training steps of a discrete schedule.

    Step i of num_train_steps, counted from 0, is t = (i + 1) / num_train_steps.

    Attributes:
        spacing: "leading", "trailing" or "linspace", the three of Lin et al. 2023, table 2.
        offset: added to the steps of "leading"; 1 in Stable Diffusion.
        skip_last: spaces one more step than asked, and leaves out the last (DPM-Solver++).
        rounded: to whole training steps; Euler's "linspace" is not.
        ends_at: the noise of the final image: none ("data"), or that of the first training step
            ("first_step": `set_alpha_to_one = False`).
        num_train_steps: of the schedule.

    Raises:
        UserError: an offset that leaves the schedule.
    """

    spacing: Literal["leading", "trailing", "linspace"] = "leading"
    offset: int = 0
    skip_last: bool = False
    rounded: bool = True
    ends_at: Literal["data", "first_step"] = "data"
    num_train_steps: int = 1000

    def __post_init__(self):
        if not 0 <= self.offset < self.num_train_steps:
            raise UserError(
                f"TrainStepGrid.offset is {self.offset}: give a number of training steps from 0 to "
                f"{self.num_train_steps - 1}."
            )

    def __call__(
        self, i: int | Int[Array, "*b"], num_steps: int | Int[Array, ""]
    ) -> Float[Array, "*b"]:
        """The time before step i of num_steps; both may be traced."""
        i, n, total = jnp.asarray(i), jnp.asarray(num_steps), self.num_train_steps
        dtype = jnp.result_type(float)
        left = n - i - 1 + self.skip_last  # steps still to come, on the way to training step 0
        match self.spacing:
            case "leading":
                step = (left * (total // (n + self.skip_last)) + self.offset).astype(dtype)
            case "trailing":
                # One rounding, of an exact product, so that halves are halves.
                step = jnp.round(total * (n - i) / n) - 1
            case "linspace":
                step = left * (total - 1) / jnp.maximum(n - 1 + self.skip_last, 1)
                step = jnp.round(step) if self.rounded else step
        end = 0.0 if self.ends_at == "data" else 1 / total
        return jnp.where(i < n, jnp.minimum((step + 1) / total, 1.0), end).astype(dtype)


@dataclass(frozen=True, kw_only=True)
class KarrasGrid:
    """Even steps in (sigma / alpha)^(1 / rho), then one into the data (Karras et al. 2022, eq. 5).

    What diffusers calls Karras sigmas, with `first` and `last` at the ends of its table of noise;
    it tells a network the nearest training step, and this grid the time itself.

    Attributes:
        schedule: the model's own.
        rho: how much shorter the steps are where there is less noise.
        first: the time before the first step.
        last: the time before the last step, which arrives at 0.
        most_noise: sigma / alpha that is spaced from, if there is more at `first`, as at t = 1 of
            a rectified flow, where it is infinite.

    Raises:
        UserError: not 0 < last < first <= 1, or rho below 1, or most_noise not positive.
    """

    schedule: AnySchedule
    rho: float = 7.0
    first: float = 1.0
    last: float = 0.001
    most_noise: float = 80.0

    def __post_init__(self):
        _check_ends(self)
        if self.rho < 1:
            raise UserError(
                f"KarrasGrid.rho is {self.rho}: give a number of at least 1, such as 7."
            )

    def __call__(
        self, i: int | Int[Array, "*b"], num_steps: int | Int[Array, ""]
    ) -> Float[Array, "*b"]:
        """The time before step i of num_steps; both may be traced."""
        most, least, share = _spaced(self, i, num_steps)
        root = most ** (1 / self.rho) * (1 - share) + least ** (1 / self.rho) * share
        return _at_noise(self, root**self.rho, i, num_steps)


@dataclass(frozen=True, kw_only=True)
class LogSnrGrid:
    """Even steps in log_snr, then one into the data (Lu et al. 2022, DPM-Solver, section 3.3).

    It is a `KarrasGrid` whose rho is infinite, and what diffusers calls exponential sigmas.

    Attributes:
        schedule: the model's own.
        first: the time before the first step.
        last: the time before the last step, which arrives at 0.
        most_noise: sigma / alpha that is spaced from, if there is more at `first`.

    Raises:
        UserError: not 0 < last < first <= 1, or most_noise not positive.
    """

    schedule: AnySchedule
    first: float = 1.0
    last: float = 0.001
    most_noise: float = 80.0

    def __post_init__(self):
        _check_ends(self)

    def __call__(
        self, i: int | Int[Array, "*b"], num_steps: int | Int[Array, ""]
    ) -> Float[Array, "*b"]:
        """The time before step i of num_steps; both may be traced."""
        most, least, share = _spaced(self, i, num_steps)
        logarithm = jnp.log(most) * (1 - share) + jnp.log(least) * share
        return _at_noise(self, jnp.exp(logarithm), i, num_steps)


def _check_ends(grid: KarrasGrid | LogSnrGrid) -> None:
    if not (0 < grid.last < grid.first <= 1 and grid.most_noise > 0):
        raise UserError(
            f"{type(grid).__name__} got first={grid.first}, last={grid.last}, "
            f"most_noise={grid.most_noise}; give 0 < last < first <= 1 and a positive most_noise."
        )


def _spaced(
    grid: KarrasGrid | LogSnrGrid, i: int | Int[Array, "*b"], num_steps: int | Int[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""], Times]:
    """sigma / alpha before the first and the last step, and which share of the way i is."""
    dtype = jnp.result_type(float)
    ends = jnp.asarray([grid.first, grid.last], dtype)
    most, least = grid.schedule.sigma(ends) / grid.schedule.alpha(ends)
    share = jnp.asarray(i, dtype) / jnp.maximum(jnp.asarray(num_steps, dtype) - 1, 1)
    return jnp.minimum(most, grid.most_noise), least, jnp.minimum(share, 1)


def _at_noise(
    grid: KarrasGrid | LogSnrGrid,
    noise_to_data: Times,
    i: int | Int[Array, "*b"],
    num_steps: int | Int[Array, ""],
) -> Times:
    """The time of that sigma / alpha; the ends are those asked for, not rounded."""
    i, n = jnp.asarray(i), jnp.asarray(num_steps)
    t = jnp.where(i == 0, grid.first, grid.schedule.time_at(noise_to_data))
    return jnp.where(i < n, t, 0.0).astype(noise_to_data.dtype)


@dataclass(frozen=True, kw_only=True)
class ExplicitGrid:
    """Times that are listed, first to last: with n + 1 of them, those of n steps.

    Other numbers of steps take times between them, at even shares of the way along the list, so
    they follow its shape (as Sabour et al. 2024, Align Your Steps, do, but in t).

    Raises:
        UserError: fewer than two times, times outside [0, 1], or times that do not fall.
    """

    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.0)

    def __post_init__(self):
        falls = all(a > b for a, b in zip(self.times, self.times[1:], strict=False))
        if len(self.times) < 2 or not falls or self.times[0] > 1 or self.times[-1] < 0:
            raise UserError(
                f"ExplicitGrid.times are {self.times}: give at least two times that fall, from at "
                "most 1 (noise) to at least 0 (data)."
            )

    def __call__(
        self, i: int | Int[Array, "*b"], num_steps: int | Int[Array, ""]
    ) -> Float[Array, "*b"]:
        """The time before step i of num_steps; both may be traced."""
        dtype = jnp.result_type(float)
        times = jnp.asarray(self.times, dtype)
        i, n, last = jnp.asarray(i), jnp.asarray(num_steps), len(self.times) - 1
        low = jnp.minimum(i * last // n, last)
        share = (i * last % n).astype(dtype) / n.astype(dtype)
        return jnp.where(
            share > 0,
            times[low] + share * (times[jnp.minimum(low + 1, last)] - times[low]),
            times[low],
        )


@dataclass(frozen=True, kw_only=True)
class ConsistencyGrid:
    """Even places in the list of steps that a consistency model was distilled on.

    The `distilled_steps` times are even, from training step k - 1 by k to the last one (Luo et al.
    2023, latent consistency models, section 4.3, and diffusers' LCMScheduler). More steps than
    that stand at some of them twice.

    Raises:
        UserError: not 1 <= distilled_steps <= num_train_steps.
    """

    distilled_steps: int = 50
    num_train_steps: int = 1000

    def __post_init__(self):
        if not 1 <= self.distilled_steps <= self.num_train_steps:
            raise UserError(
                f"ConsistencyGrid.distilled_steps is {self.distilled_steps}: give a number from 1 "
                f"to the {self.num_train_steps} of num_train_steps."
            )

    def __call__(
        self, i: int | Int[Array, "*b"], num_steps: int | Int[Array, ""]
    ) -> Float[Array, "*b"]:
        """The time before step i of num_steps; both may be traced."""
        i, n, count = jnp.asarray(i), jnp.asarray(num_steps), self.distilled_steps
        step = (count - i * count // n) * (self.num_train_steps // count)
        return (step / self.num_train_steps).astype(jnp.result_type(float))


AnyGrid = TimeGrid | TrainStepGrid | KarrasGrid | LogSnrGrid | ExplicitGrid | ConsistencyGrid
