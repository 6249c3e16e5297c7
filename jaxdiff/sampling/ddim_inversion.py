"""DDIM inversion: from an image to the noise that it is drawn from.

On the straightened path z = x / (alpha + sigma), tau = sigma / (alpha + sigma) of `Euler`, where
dz / d tau = u = eps - x0, DDIM goes from tau to a smaller tau' by z' = z - (tau - tau') u(z, tau).
Where it came from is the solution z of

    z = z' + (tau - tau') u(z, tau)                                                (1)

Evaluated at z' instead, (1) is the inversion of Dhariwal & Nichol 2021, appendix F, and is off by
as much as the steps are long. Solved by going round it (Pan et al. 2023, AIDI, eq. 6) it undoes the
very steps that DDIM takes. For a denoiser whose estimate follows x_t by a share k, from 0 to 1, of
what it could at most, a round leaves of the error about

    (tau - tau') ((1 - k) / tau - k / (1 - tau))                                   (2)

so that few are enough, but for details that the denoiser removes (k = 0) in the last step into
tau' = 0: of them no noise is the source.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxdiff.diffusion.process import Images
from jaxdiff.errors import UserError
from jaxdiff.sampling.loop import Grid
from jaxdiff.sampling.solvers_ode import Denoise, Memory, Step, Stepped


def reversed_grid(grid: Grid) -> Grid:
    """The same times the other way round, from data to noise."""

    def at(i: int | Int[Array, ""], num_steps: int | Int[Array, ""]) -> Float[Array, ""]:
        return grid(jnp.asarray(num_steps - i), jnp.asarray(num_steps))

    return at


@dataclass(frozen=True, kw_only=True)
class DDIMInverse:
    """Eq. 1, on a grid that goes from data to noise; it undoes `DDIM` and `Euler`.

    Attributes:
      rounds: evaluations of the denoiser in each step, the first of them at where the step before
        was heading.

    Raises:
      UserError: no round.
    """

    rounds: int = 1

    def __post_init__(self):
        if self.rounds < 1:
            raise UserError(f"DDIMInverse.rounds is {self.rounds}: expected at least 1.")

    def init(self, x: Images) -> Memory:
        """Heading nowhere."""
        return jnp.zeros_like(x)

    def step(
        self, denoise: Denoise, x: Images, memory: Memory, s: Step, keys: Key[Array, " b"]
    ) -> Stepped:
        """Up from s.t to s.next_t, where there is more noise."""
        total, next_total = s.alpha + s.sigma, s.next_alpha + s.next_sigma
        next_tau = s.next_sigma / next_total
        rise = next_tau - s.sigma / total

        def again(_: Int[Array, ""], state: tuple[Images, Images]) -> tuple[Images, Images]:
            z = x / total + rise * state[0]
            x0 = denoise(z * next_total, s.next_t)
            return (z - x0) / next_tau, x0

        u, x0 = jax.lax.fori_loop(0, self.rounds, again, (memory, x))
        return Stepped((x / total + rise * u) * next_total, x0, u)
