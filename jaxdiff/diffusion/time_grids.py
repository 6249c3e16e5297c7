"""Time grids: the times of a sampler's steps, from 1 (noise) down to 0 (data).

grid(i, num_steps, num_tokens) is the time before step i: the first step starts at i = 0, the last
one ends at i = num_steps. These two may be traced, so a different number of steps does not
recompile. num_tokens is the number of image tokens that the network reads, static as the shape of
x_t is; grids of large models add noise with it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Fraction, Natural, Positive, Range
from jaxdiff.diffusion.schedules import AnySchedule, Times, shift_time
from jaxdiff.diffusion.time_shifts import EmpiricalShift, TokenShift
from jaxdiff.errors import UserError

Index = int | Int[Array, "*b"]
NumSteps = int | Int[Array, ""]

MOST_STEPS = 100_000
"""Of a sampler; grids multiply them by training steps in int32."""


@runtime_checkable
class Grid(Protocol):
    """Interface of time grids; one's own is a frozen dataclass with this method.

    A grid of few times has an attribute `max_steps` too: more steps than that are refused.
    """

    def __call__(self, i: Index, num_steps: NumSteps, num_tokens: int, /) -> Float[Array, "*b"]:
        """Return the time before step i of num_steps: decreasing in i, about 1 at 0."""
        ...


@checked
@dataclass(frozen=True, kw_only=True)
class TimeGrid:
    """t = (1 - i / num_steps)^rho, shifted by `shift_time`.

    rho = 1 is uniform. A larger rho shortens the steps near the data, as Karras et al. 2022, eq. 5,
    do in sigma: where log_snr diverges, uniform steps are too long for multistep solvers. A shift
    above 1 spends more steps at high noise; use the shift that the network was trained with. On
    Stable Diffusion's schedule the uniform grid is "trailing" of Lin et al. 2023, table 2.

    Raises:
        UserError: shift is not positive, or rho is below 1.
    """

    shift: Positive = 1.0
    rho: Annotated[float, Range(1)] = 1.0

    def __call__(self, i: Index, num_steps: NumSteps, num_tokens: int) -> Float[Array, "*b"]:
        """The time before step i of num_steps."""
        dtype = jnp.result_type(float)
        left = jnp.asarray(num_steps - i, dtype) / jnp.asarray(num_steps, dtype)
        return shift_time(left**self.rho, self.shift)


@checked
@dataclass(frozen=True, kw_only=True)
class TrainStepGrid:
    """The grids of diffusers, on the training steps of a discrete schedule.

    Step i of num_train_steps, counted from 0, is t = (i + 1) / num_train_steps.

    Attributes:
        spacing: "leading", "trailing" or "linspace" (Lin et al. 2023, table 2).
        offset: added to the steps of "leading"; 1 in Stable Diffusion.
        skip_last: space num_steps + 1 steps and leave out the last (DPM-Solver++).
        rounded: round to whole training steps; False for "linspace" of diffusers' Euler.
        ends_at: the noise of the final image: none ("data"), or that of the first training step
            ("first_step", diffusers' `set_alpha_to_one = False`).
        num_train_steps: steps of the schedule.

    Raises:
        UserError: offset is outside the schedule.
    """

    spacing: Literal["leading", "trailing", "linspace"] = "leading"
    offset: Natural = 0
    skip_last: bool = False
    rounded: bool = True
    ends_at: Literal["data", "first_step"] = "data"
    num_train_steps: Count = 1000

    def __post_init__(self):
        if self.offset >= self.num_train_steps:
            raise UserError(
                f"TrainStepGrid.offset is {self.offset}: expected a number from 0 to "
                f"{self.num_train_steps - 1}."
            )

    @property
    def max_steps(self) -> int:
        """The number of steps beyond which two would be at the same time."""
        if self.spacing == "linspace" and not self.rounded:
            return MOST_STEPS
        beyond = self.offset if self.spacing == "leading" else 0  # clipped to the last step
        return max(1, self.num_train_steps - self.skip_last - beyond)

    def __call__(self, i: Index, num_steps: NumSteps, num_tokens: int) -> Float[Array, "*b"]:
        """The time before step i of num_steps."""
        i, n, total = jnp.asarray(i), jnp.asarray(num_steps), self.num_train_steps
        dtype = jnp.result_type(float)
        left = n - i - 1 + self.skip_last  # steps before training step 0 is reached
        match self.spacing:
            case "leading":
                step = (left * (total // (n + self.skip_last)) + self.offset).astype(dtype)
            case "trailing":
                step = jnp.round(total * (n - i) / n) - 1  # an exact product, rounded once
            case "linspace":
                step = left * (total - 1) / jnp.maximum(n - 1 + self.skip_last, 1)
                step = jnp.round(step) if self.rounded else step
        end = 0.0 if self.ends_at == "data" else 1 / total
        return jnp.where(i < n, jnp.minimum((step + 1) / total, 1.0), end).astype(dtype)


@checked
@dataclass(frozen=True, kw_only=True)
class KarrasGrid:
    """Uniform in (sigma / alpha)^(1 / rho), then a last step to 0 (Karras et al. 2022, eq. 5).

    With `first` and `last` at the ends of its noise table these are the Karras sigmas of diffusers,
    except that diffusers passes the nearest training step to the network, and this grid the time.

    Attributes:
        schedule: the model's schedule.
        rho: larger values shorten the steps at low noise.
        first: the time before the first step.
        last: the time before the last step, which ends at 0.
        max_sigma: upper bound of sigma / alpha, for schedules where it is infinite at `first`, such
            as a rectified flow at t = 1.

    Raises:
        UserError: not 0 < last < first <= 1, rho below 1, or max_sigma not positive.
    """

    schedule: AnySchedule
    rho: Annotated[float, Range(1)] = 7.0
    first: float = 1.0
    last: float = 0.001
    max_sigma: Positive = 80.0

    def __post_init__(self):
        _check_ends(self)

    def __call__(self, i: Index, num_steps: NumSteps, num_tokens: int) -> Float[Array, "*b"]:
        """The time before step i of num_steps."""
        most, least, fraction = _ends(self, i, num_steps)
        root = most ** (1 / self.rho) * (1 - fraction) + least ** (1 / self.rho) * fraction
        return _time_at(self, root**self.rho, i, num_steps)


@checked
@dataclass(frozen=True, kw_only=True)
class LogSnrGrid:
    """Uniform in log_snr, then a last step to 0 (Lu et al. 2022, DPM-Solver, section 3.3).

    The limit of `KarrasGrid` for rho -> infinity; the exponential sigmas of diffusers.

    Attributes:
        schedule: the model's schedule.
        first: the time before the first step.
        last: the time before the last step, which ends at 0.
        max_sigma: upper bound of sigma / alpha at `first`.

    Raises:
        UserError: not 0 < last < first <= 1, or max_sigma not positive.
    """

    schedule: AnySchedule
    first: float = 1.0
    last: float = 0.001
    max_sigma: Positive = 80.0

    def __post_init__(self):
        _check_ends(self)

    def __call__(self, i: Index, num_steps: NumSteps, num_tokens: int) -> Float[Array, "*b"]:
        """The time before step i of num_steps."""
        most, least, fraction = _ends(self, i, num_steps)
        logarithm = jnp.log(most) * (1 - fraction) + jnp.log(least) * fraction
        return _time_at(self, jnp.exp(logarithm), i, num_steps)


def _check_ends(grid: KarrasGrid | LogSnrGrid) -> None:
    if not 0 < grid.last < grid.first <= 1:
        raise UserError(
            f"{type(grid).__name__} got first={grid.first}, last={grid.last}: expected 0 < last < "
            "first <= 1."
        )


def _ends(
    grid: KarrasGrid | LogSnrGrid, i: Index, num_steps: NumSteps
) -> tuple[Float[Array, ""], Float[Array, ""], Times]:
    """Return sigma / alpha before the first and last step, and step i's position in [0, 1]."""
    dtype = jnp.result_type(float)
    ends = jnp.asarray([grid.first, grid.last], dtype)
    most, least = grid.schedule.sigma(ends) / grid.schedule.alpha(ends)
    fraction = jnp.asarray(i, dtype) / jnp.maximum(jnp.asarray(num_steps, dtype) - 1, 1)
    return jnp.minimum(most, grid.max_sigma), least, jnp.minimum(fraction, 1)


def _time_at(
    grid: KarrasGrid | LogSnrGrid, noise_to_data: Times, i: Index, num_steps: NumSteps
) -> Times:
    """Return the time at a value of sigma / alpha; exactly `first` and 0 at the ends."""
    i, n = jnp.asarray(i), jnp.asarray(num_steps)
    t = jnp.where(i == 0, grid.first, grid.schedule.time_at(noise_to_data))
    return jnp.where(i < n, t, 0.0).astype(noise_to_data.dtype)


@checked
@dataclass(frozen=True, kw_only=True)
class ExplicitGrid:
    """A list of times; n + 1 of them define the grid of n steps.

    Any other number of steps interpolates the list linearly in its index (Sabour et al. 2024, Align
    Your Steps, interpolate log sigma).

    Raises:
        UserError: fewer than two times, or times that do not decrease within [0, 1].
    """

    times: tuple[Fraction, ...] = (1.0, 0.75, 0.5, 0.25, 0.0)

    def __post_init__(self):
        decreasing = all(a > b for a, b in zip(self.times, self.times[1:], strict=False))
        if not 2 <= len(self.times) <= MOST_STEPS or not decreasing:
            raise UserError(
                f"ExplicitGrid.times are {self.times}: expected at least two decreasing times "
                "between 1 (noise) and 0 (data)."
            )

    def __call__(self, i: Index, num_steps: NumSteps, num_tokens: int) -> Float[Array, "*b"]:
        """The time before step i of num_steps."""
        dtype = jnp.result_type(float)
        times = jnp.asarray(self.times, dtype)
        i, n, last = jnp.asarray(i), jnp.asarray(num_steps), len(self.times) - 1
        low = jnp.minimum(i * last // n, last)
        fraction = (i * last % n).astype(dtype) / n.astype(dtype)
        high = times[jnp.minimum(low + 1, last)]
        return jnp.where(fraction > 0, times[low] + fraction * (high - times[low]), times[low])


@checked
@dataclass(frozen=True, kw_only=True)
class ConsistencyGrid:
    """Evenly spaced entries of the steps that a consistency model was distilled on.

    The `distilled_steps` times are every k-th training step, from k - 1 to the last (Luo et al.
    2023, latent consistency models, section 4.3, and diffusers' LCMScheduler).

    Raises:
        UserError: not 1 <= distilled_steps <= num_train_steps.
    """

    distilled_steps: Count = 50
    num_train_steps: Count = 1000

    def __post_init__(self):
        if self.distilled_steps > self.num_train_steps:
            raise UserError(
                f"ConsistencyGrid.distilled_steps is {self.distilled_steps}: expected 1 to "
                f"num_train_steps, {self.num_train_steps}."
            )

    @property
    def max_steps(self) -> int:
        """The number of steps beyond which some would be repeated."""
        return self.distilled_steps

    def __call__(self, i: Index, num_steps: NumSteps, num_tokens: int) -> Float[Array, "*b"]:
        """The time before step i of num_steps."""
        i, n, count = jnp.asarray(i), jnp.asarray(num_steps), self.distilled_steps
        step = (count - i * count // n) * (self.num_train_steps // count)
        return (step / self.num_train_steps).astype(jnp.result_type(float))


@checked
@dataclass(frozen=True, kw_only=True)
class FlowGrid:
    """The sigmas of diffusers' FlowMatchEulerDiscreteScheduler for FLUX and Z-Image.

    t = 1, 1 - 1/n, ..., 1/n, shifted by eq. 1 of `time_shifts`, then 0.

    Attributes:
        shift: s of eq. 1.
        token_shift: multiplies `shift` by what the number of image tokens asks for.
        terminal: the time before the last step, to which the times are stretched: diffusers'
            shift_terminal. A single step starts at 1.
    """

    shift: Positive = 1.0
    token_shift: TokenShift | EmpiricalShift | None = None
    terminal: Annotated[float | None, Range(0, 1, "()")] = None

    def __call__(self, i: Index, num_steps: NumSteps, num_tokens: int) -> Float[Array, "*b"]:
        """The time before step i of num_steps."""
        i, n, dtype = jnp.asarray(i), jnp.asarray(num_steps), jnp.result_type(float)
        shift: float | Float[Array, ""] = self.shift
        if isinstance(self.token_shift, TokenShift):
            shift = shift * self.token_shift(num_tokens)
        elif self.token_shift is not None:
            shift = shift * self.token_shift(num_tokens, n)
        left = (n - i).astype(dtype) / n.astype(dtype)
        noise = self._noise(left, shift)
        if self.terminal is not None:
            last = self._noise(1 / n.astype(dtype), shift)
            noise = jnp.where(n > 1, 1 - (1 - noise) * ((1 - self.terminal) / (1 - last)), noise)
        return jnp.where(i < n, noise, 0.0).astype(dtype)

    @staticmethod
    def _noise(t: Times, shift: float | Float[Array, ""]) -> Times:
        """Return eq. 1 of `time_shifts`, exactly 1 at 1."""
        return shift / (shift + (1 / t - 1))


AnyGrid = (
    TimeGrid
    | TrainStepGrid
    | KarrasGrid
    | LogSnrGrid
    | ExplicitGrid
    | ConsistencyGrid
    | FlowGrid
    | Grid
)
