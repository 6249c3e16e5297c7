"""Averages of the weights whose width is chosen after training (Karras et al. 2024, section 3).

The average of the weights theta with exponent gamma, after t steps, is

    (gamma + 1) / t^(gamma + 1)  integral_0^t tau^gamma theta(tau) dtau,

updated by a <- beta a + (1 - beta) theta(t) with beta = (1 - 1 / t)^(gamma + 1) (eqs. 2 and 3). Its
width is the standard deviation of its profile over t,

    width = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2)         (eq. 4).

A run tracks averages of a few widths and stores snapshots of them. The profile of any other width
is close to a linear combination of the stored ones, whose inner products have a closed form: least
squares give the coefficients, and these the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float64, Int, PyTree

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Range
from jaxdiff.errors import UserError
from jaxdiff.pretrained import checkpoint_folder
from jaxdiff.training.checkpoint import Checkpoints

SNAPSHOTS = "ema_snapshots"

_PREFIX = "width_"
_NEGLIGIBLE = 1e-7  # coefficients that float32 cannot see

Width = Annotated[float, Range(0.001, 0.28)]
"""The uniform average has 0.289, the widest profile of this family."""


@checked
@dataclass(frozen=True, kw_only=True)
class PostHocEma:
    """Averages that a run tracks, in float32, and stores for `jaxdiff ema`.

    Each width takes as much memory as the parameters, and each snapshot as much storage in `dtype`.

    Attributes:
      widths: relative standard deviations of the profiles, all different.
      snapshot_every: steps between snapshots; the last step has one, too. With 20 of a run, widths
        from 0.03 to 0.2 are within 0.1 % of the average computed directly.
      dtype: stored type of snapshots.

    Raises:
      UserError: there is no width, or two are equal.
    """

    widths: tuple[Width, ...] = (0.05, 0.1)
    snapshot_every: Count = 1000
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self):
        if not self.widths or len(set(self.widths)) < len(self.widths):
            raise UserError(
                f"ema.post_hoc.widths are {self.widths}: expected one or more different numbers, "
                "such as 0.05 and 0.1."
            )

    def init(self, params: PyTree) -> dict[str, PyTree]:
        """Return an average of the initial parameters for each width, by its name on disk."""
        return {
            part_of_width(width): jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
            for width in self.widths
        }

    def update(
        self, averages: dict[str, PyTree], params: PyTree, step: int | Int[Array, ""]
    ) -> dict[str, PyTree]:
        """Update the averages with the parameters after update `step`, counted from 0."""
        # Without cancellation in 1 - 1 / t and 1 - beta, which float32 would not survive late in a
        # run. The first update replaces the initial parameters: beta is 0.
        log_decay = jnp.log1p(-1 / (jnp.float32(step) + 1))

        def updated(width: float) -> PyTree:
            new = -jnp.expm1((gamma_of(width) + 1) * log_decay)
            average = averages[part_of_width(width)]
            return jax.tree.map(lambda a, p: a + new * (p.astype(jnp.float32) - a), average, params)

        return {part_of_width(width): updated(width) for width in self.widths}


def part_of_width(width: float) -> str:
    """Return the name of a width's part of a snapshot."""
    return f"{_PREFIX}{width:g}"


def gamma_of(width: float) -> float:
    """Return the exponent of a width: the largest root of eq. 4, a cubic."""
    inverse = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def coefficients(
    times: Float64[np.ndarray, " n"],
    widths: Float64[np.ndarray, " n"],
    *,
    at: float,
    width: float,
) -> Float64[np.ndarray, " n"]:
    """Return the combination of averages that is nearest to another one; the sum is 1.

    Nearest in the squared difference of the profiles, integrated over time. That the sum is 1
    reproduces constant weights exactly, and is several times more accurate for few snapshots than
    the unconstrained least squares of Karras et al.

    Args:
      times: steps of the averages.
      widths: of the averages.
      at: step of the other average.
      width: of the other average.
    """
    gammas = np.array([gamma_of(w) for w in widths])
    products = _inner_products(times[:, None], gammas[:, None], times, gammas)
    target = _inner_products(times, gammas, np.array([at]), np.array([gamma_of(width)]))
    nearest, shift = np.linalg.lstsq(
        products, np.stack([target, np.ones_like(target)], axis=1), rcond=1e-14
    )[0].T
    return nearest + shift * (1 - nearest.sum()) / shift.sum()


def _inner_products(
    t: np.ndarray, gamma: np.ndarray, other_t: np.ndarray, other_gamma: np.ndarray
) -> np.ndarray:
    """Return the integrals of products of two profiles, each (gamma + 1) tau^gamma / t^(gamma + 1).

    By logarithms: powers of the number of steps exceed float64.
    """
    a, b = gamma + 1, other_gamma + 1
    exponent = (a + b - 1) * np.log(np.minimum(t, other_t)) - a * np.log(t) - b * np.log(other_t)
    return a * b / (a + b - 1) * np.exp(exponent)


class Snapshots:
    """Write the snapshots of a run, in the background; without `settings` do nothing.

    Every process of a multi-host run creates one and makes the same calls.

    Args:
      folder: of the run.
      settings: what the run tracks.
      report: called with one sentence for each problem that does not end the run.
    """

    def __init__(
        self, folder: epath.Path, settings: PostHocEma | None, report: Callable[[str], None]
    ):
        self._settings = settings
        if settings is not None:
            self._store = Checkpoints(folder / SNAPSHOTS, keep=None, report=report)
            dtype = settings.dtype
            self._cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))

    def resume(self, step: int, averages: PyTree) -> None:
        """Write the snapshot of a restored step if it is due and was lost."""
        if step and self._settings is not None and step not in self._store.steps():
            self.after(step, averages)

    def after(self, step: int, averages: PyTree) -> None:
        """Write a snapshot if one is due after a step."""
        if self._settings is not None and step % self._settings.snapshot_every == 0:
            self.save(step, averages)

    def save(self, step: int, averages: PyTree) -> None:
        """Start to write the averages after a step, once the previous snapshot is written."""
        if self._settings is not None:
            self._store.save_parts(step, self._cast(averages))

    def wait(self) -> None:
        """Wait until the last snapshot is on disk.

        Raises:
          UserError: it could not be written.
        """
        if self._settings is not None:
            self._store.wait()

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, *error) -> None:
        if self._settings is not None:
            self._store.__exit__(*error)


class StoredAverages:
    """The snapshots of a run, as averages of any width; damaged ones are reported and left out.

    Raises:
      UserError: there are no snapshots, or all are damaged.
    """

    def __init__(self, run: epath.PathLike, report: Callable[[str], None]):
        self._folder = checkpoint_folder.absolute(epath.Path(run) / SNAPSHOTS)
        self._parts: list[tuple[int, str]] = []
        for step in checkpoint_folder.steps(self._folder):
            path = self._folder / str(step)
            if problem := checkpoint_folder.damage(path):
                report(f"The snapshot {path} is damaged and not used: {problem}.")
            else:
                self._parts += [(step, name) for name in checkpoint_folder.parts_of(path)]
        if not self._parts:
            raise UserError(
                f"{run} has no snapshots of averages: expected a run whose recipe sets "
                "ema.post_hoc, such as ema=Ema(post_hoc=PostHocEma()), and that has reached one."
            )

    @property
    def last_step(self) -> int:
        """The step of the last snapshot, up to which all weights are averaged."""
        return max(step for step, _ in self._parts)

    def of_width(self, width: float) -> PyTree:
        """Return the trained parameters, averaged with a width, in float32 on the host.

        Snapshots are read one at a time.
        """
        times = np.array([step for step, _ in self._parts], np.float64)
        widths = np.array([float(name.removeprefix(_PREFIX)) for _, name in self._parts])
        weights = coefficients(times, widths, at=self.last_step, width=width)
        total = None
        for (step, name), weight in zip(self._parts, weights.astype(np.float32), strict=True):
            if abs(weight) < _NEGLIGIBLE:
                continue
            saved = checkpoint_folder.load_part(self._folder / str(step), name)
            scaled = jax.tree.map(lambda x, w=weight: w * np.asarray(x, np.float32), saved)
            total = scaled if total is None else jax.tree.map(np.add, total, scaled)
        return total
