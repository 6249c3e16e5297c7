"""Sampler settings: defaults of a model, which a caller may override."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import jax.numpy as jnp

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import BelowOne, Count, Interval, Range
from jaxdiff.diffusion.time_grids import MOST_STEPS, AnyGrid, TimeGrid
from jaxdiff.errors import UserError
from jaxdiff.sampling.feature_cache import AnyCache, TaylorSeer
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.guidance.thresholds import AnyThreshold
from jaxdiff.sampling.solvers import AnySolver
from jaxdiff.sampling.solvers_ode import DPMSolverPP2M

VaeMode = Literal["full", "slicing", "tiling"]
"""What an autoencoder processes at a time: the whole batch, one image, or one tile of an image."""


Steps = Annotated[int, Range(1, MOST_STEPS)]
"""Number of steps of a solver."""


@checked
@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Settings of the sampling loop; a field that is None inherits the model's.

    Attributes:
      solver: solver of the sampling ODE or SDE.
      grid: times that the solver visits.
      num_steps: number of steps of the solver.
      guidance_scale: scale of classifier-free guidance; 1 is the conditional model, unguided.
        Networks with a guidance embedding read it instead.
      guidance: all other options of guidance.
      threshold: keeps estimates of x0 in range; for pixels, not for latents.
      init_noise: "unit" starts from noise of variance 1, as diffusers does with Stable Diffusion;
        "schedule" from sigma of the first time, which is slightly less.
      resample_steps: times that each step is taken, with fresh noise in between (RePaint); more
        steps harmonise inpainted areas with their surroundings.
      vae_mode: what the autoencoder processes at a time.
      wrap: whether images are tileable, vertically and horizontally.
      overlap: overlap of MultiDiffusion windows, as a fraction of their sides; None denoises the
        image as a whole.
      cache: reuses features of earlier steps, for speed at some distance from the exact image.
      denoising_interval: the part of the way from noise, 0, to the image, 1, that is taken: the
        denoising_start and denoising_end of diffusers. (0, 0.8) returns the noisy latents from
        which another model, such as Stable Diffusion XL's refiner, continues with (0.8, 1).

    Raises:
      UserError: a number out of range.
    """

    solver: AnySolver | None = None
    grid: AnyGrid | None = None
    num_steps: Steps | None = None
    guidance_scale: float | None = None
    guidance: Guidance | None = None
    threshold: AnyThreshold | None = None
    init_noise: Literal["unit", "schedule"] | None = None
    resample_steps: Count | None = None
    vae_mode: VaeMode | None = None
    wrap: tuple[bool, bool] | None = None
    overlap: BelowOne | None = None
    cache: AnyCache | None = None
    denoising_interval: Annotated[tuple[float, float], Interval()] | None = None

    def inherit(self, other: "Sampler") -> "Sampler":
        """Return these settings, with another's in the place of those that are None."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.guidance is not None and other.guidance is not None:
            changes["guidance"] = self.guidance.inherit(other.guidance)
        return dataclasses.replace(other, **changes)

    def resolve(self) -> "ResolvedSampler":
        """Return these settings with the package's defaults in the place of None."""
        merged = self.inherit(_DEFAULTS)
        if isinstance(merged.cache, TaylorSeer) and merged.cache.interval == 1:
            merged = dataclasses.replace(merged, cache=None)
        values = {f.name: getattr(merged, f.name) for f in dataclasses.fields(merged)}
        return ResolvedSampler(**values)


_DEFAULTS = Sampler(
    solver=DPMSolverPP2M(),
    grid=TimeGrid(),
    num_steps=20,
    guidance_scale=3.0,
    guidance=Guidance(),
    init_noise="schedule",
    resample_steps=1,
    vae_mode="full",
    wrap=(False, False),
    denoising_interval=(0.0, 1.0),
)


@dataclass(frozen=True, kw_only=True)
class ResolvedSampler:
    """A `Sampler` with a value for every field but `overlap`, `threshold` and `cache`."""

    solver: AnySolver
    grid: AnyGrid
    num_steps: int
    guidance_scale: float
    guidance: Guidance
    threshold: AnyThreshold | None
    init_noise: Literal["unit", "schedule"]
    resample_steps: int
    vae_mode: VaeMode
    wrap: tuple[bool, bool]
    overlap: float | None
    cache: AnyCache | None = None
    denoising_interval: tuple[float, float] = (0.0, 1.0)

    def steps_taken(self, num_steps: int, num_tokens: int) -> tuple[int, int]:
        """Return the first step of `denoising_interval`, and the step after its last.

        A step belongs to the interval in which it starts.

        Raises:
          UserError: no step starts there.
        """
        low, high = self.denoising_interval
        if (low, high) == (0, 1):
            return 0, num_steps
        times = self.grid(jnp.arange(num_steps), num_steps, num_tokens)
        first, last = (int((times > 1 - share + 1e-6).sum()) for share in (low, high))
        last = num_steps if high == 1 else last
        if first == last:
            raise UserError(
                f"none of {num_steps} steps starts in {low:g}-{high:g} of the way from noise to "
                "the image: expected a wider part; change denoising_interval (--refiner-start), or "
                "increase num_steps."
            )
        return first, last

    def check_steps(self, num_steps: int) -> None:
        """Raise `UserError` for steps that the grid does not have, or without any guided one.

        Also for repeated steps with a cache, which starts again at each.
        """
        if self.cache is not None and self.resample_steps > 1:
            raise UserError(
                f"resample_steps is {self.resample_steps} with a cache of features: expected 1; "
                "leave one of them out."
            )
        most = getattr(self.grid, "max_steps", MOST_STEPS)
        if num_steps > most:
            raise UserError(
                f"num_steps is {num_steps}: expected at most {most}, the steps that the model's "
                f"{type(self.grid).__name__} has; choose fewer, or another grid."
            )
        self.guidance.check_steps(num_steps)
