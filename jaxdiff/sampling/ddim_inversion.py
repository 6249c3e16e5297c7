"""DDIM inversion: from an image to the noise that the sampler maps to it.

On the straightened path z = x / (alpha + sigma), tau = sigma / (alpha + sigma) of `Euler`, where
dz / d tau = u = eps - x0, DDIM goes from tau to a smaller tau' by z' = z - (tau - tau') u(z, tau).
Its inverse is the solution z of

    z = z' + (tau - tau') u(z, tau)                                                (1)

Evaluated at z' instead, (1) is the inversion of Dhariwal & Nichol 2021, appendix F, whose error
grows with the length of the steps. Fixed-point iteration (Pan et al. 2023, AIDI, eq. 6) inverts the
steps of DDIM exactly. Let k, from 0 to 1, be the relative sensitivity of a denoiser's estimate to
x_t. One iteration then multiplies the error by about

    (tau - tau') ((1 - k) / tau - k / (1 - tau))                                   (2)

so that few iterations are enough, except for details that the denoiser removes (k = 0) in the last
step into tau' = 0: no noise maps to these.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count
from jaxdiff.diffusion.process import Images
from jaxdiff.diffusion.time_grids import Grid
from jaxdiff.sampling.solver import Denoise, SolverState, State, Step, StepOutput


def reverse_grid(grid: Grid) -> Grid:
    """Return the same times in the opposite order, from data to noise."""

    def at(
        i: int | Int[Array, ""], num_steps: int | Int[Array, ""], num_tokens: int
    ) -> Float[Array, ""]:
        return grid(jnp.asarray(num_steps - i), jnp.asarray(num_steps), num_tokens)

    return at


@checked
@dataclass(frozen=True, kw_only=True)
class DDIMInverse:
    """Eq. 1 on a grid from data to noise; inverts `DDIM` and `Euler`.

    Attributes:
      rounds: evaluations per step; the first one extrapolates the direction of the last step.

    Raises:
      UserError: rounds is less than 1.
    """

    rounds: Count = 1

    def init(self, x: Images) -> SolverState:
        """Return a direction of 0."""
        return jnp.zeros_like(x)

    def step(
        self,
        denoise: Denoise,
        x: Images,
        solver_state: SolverState,
        state: State,
        s: Step,
        keys: Key[Array, " b"],
    ) -> StepOutput:
        """Move x from s.t to s.next_t, where there is more noise."""
        total, next_total = s.alpha + s.sigma, s.next_alpha + s.next_sigma
        next_tau = s.next_sigma / next_total
        rise = next_tau - s.sigma / total

        def iterate(
            i: Int[Array, ""], carry: tuple[Images, Images, State]
        ) -> tuple[Images, Images, State]:
            u, _, first_state = carry
            z = x / total + rise * u
            x0, new = denoise(z * next_total, s.next_t, state)
            first_state = jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), new, first_state)
            return (z - x0) / next_tau, x0, first_state

        u, x0, next_state = jax.lax.fori_loop(0, self.rounds, iterate, (solver_state, x, state))
        return StepOutput((x / total + rise * u) * next_total, x0, u, next_state)
