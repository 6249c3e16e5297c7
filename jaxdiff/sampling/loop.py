"""The sampling loop, and its random numbers.

The keys of image i are folded from (seeds[i], purpose, step): an image depends neither on its index
in the batch nor on the batch size.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from jaxdiff.diffusion.process import Images
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.diffusion.time_grids import Grid
from jaxdiff.distributed.sharding import split_images
from jaxdiff.sampling.solver import (
    Scalar,
    Solver,
    SolverState,
    State,
    StatefulDenoiser,
    Step,
    noise_like,
)

INITIAL_NOISE, STEP_NOISE = 0, 1  # purposes of keys


def keys_from_seeds(seeds: Integer[Array, " b"], purpose: int) -> Key[Array, " b"]:
    """Return one key per seed, of a fixed generator whatever JAX's settings."""
    keys = jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(seeds)
    return jax.vmap(jax.random.fold_in, (0, None))(keys, purpose)


def noise_from_seeds(seeds: Integer[Array, " b"], shape: tuple[int, int, int]) -> Images:
    """Sample standard normal noise [b, *shape], float32; each image depends only on its seed."""
    keys = keys_from_seeds(seeds, INITIAL_NOISE)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


class InitLatents(NamedTuple):
    """Latents from which sampling starts instead of pure noise.

    Attributes:
      x0: latents, or pixels, to start from.
      mask: 1 where x0 is replaced and 0 where it is kept; None replaces all of it.
      first_step: index of the first step.
      from_noise: whether a run from step 0 starts from pure noise.
      has_noise: whether x0 is x_t before the first step, of another run, instead of data.
    """

    x0: Images
    mask: Float[Array, "b h w 1"] | None = None
    first_step: int | Int[Array, ""] = 0
    from_noise: bool = False
    has_noise: bool = False


LoopState = Any  # the loop's carry, a tree of arrays


class Segment(NamedTuple):
    """Consecutive steps of a run that takes several calls.

    Attributes:
      begin: the first step of the segment.
      end: the step after its last.
      state: returned by the segment before; the first segment of a run ignores its values.
    """

    begin: Int[Array, ""]
    end: Int[Array, ""]
    state: LoopState


class Sampled(NamedTuple):
    """The result of a run of the sampler, or of a segment.

    Attributes:
      images: x_t after the last step.
      snapshots: estimates of x0 on the way, first to last.
      state: for the next segment.
    """

    images: Images
    snapshots: Float[Array, "k b h w c"]
    state: LoopState


def init_loop_state(
    denoiser: StatefulDenoiser, solver: Solver, x: Images, num_snapshots: int
) -> LoopState:
    """Return the loop's carry before the first step, from x_t there."""
    snapshots = jnp.zeros((num_snapshots, *x.shape), x.dtype)
    return x, (solver.init(x), denoiser.init_state(x)), snapshots


def sample(
    denoiser: StatefulDenoiser,
    solver: Solver,
    schedule: Schedule,
    grid: Grid,
    num_steps: int | Int[Array, ""],
    noise: Images,
    seeds: Integer[Array, " b"],
    *,
    init_noise: Literal["unit", "schedule"] = "schedule",
    num_snapshots: int = 0,
    init: InitLatents | None = None,
    resample_steps: int = 1,
    segment: Segment | None = None,
    num_tokens: int | None = None,
) -> Sampled:
    """Integrate from noise at the grid's first time to an image at its last.

    num_steps, the segment's bounds and the first step may be traced: under jit neither they nor the
    seeds, nor any array that `denoiser` closes over, recompiles.

    Args:
      denoiser: of x_t; `stateless` wraps a function.
      solver: takes the steps.
      schedule: of the noise.
      grid: the times.
      num_steps: of the run.
      noise: of unit variance (`noise_from_seeds`).
      seeds: one per image, for solvers that add noise.
      init_noise: "schedule" scales the noise to the sigma of the first time, "unit" does not.
      num_snapshots: k, static. Snapshot j is the estimate of x0 after a fraction (j + 1) / k of the
        steps, so the last is that of the last step.
      init: start at its first step, from its x0 with as much noise (SDEdit, Meng et al. 2022,
        algorithm 1). Where its mask is 0, x is set to x0 with the noise of the time after each
        step (RePaint, Lugmayr et al. 2022, eq. 8, with one noise for all times).
      resample_steps: times that each step is taken, static, with fresh noise in between (RePaint,
        section 4.2, and Bansal et al. 2023, section 3.4), which harmonises the replaced region with
        its surroundings, or with guidance.
      segment: take only these steps.
      num_tokens: image tokens of the network, for the grid; by default one per position of x_t.
    """
    num_tokens = noise.shape[1] * noise.shape[2] if num_tokens is None else num_tokens
    path = _Path(schedule, grid, jnp.asarray(num_steps, jnp.int32), num_tokens, noise, init)
    keys = keys_from_seeds(seeds, STEP_NOISE)
    slots = jnp.arange(num_snapshots).reshape(-1, 1, 1, 1, 1)
    first_step = 0 if init is None else init.first_step

    def body(i, carry):
        x, states, snapshots = carry
        x = split_images(x)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        x, x0, states = _step(denoiser, solver, path, i, x, states, step_keys, resample_steps)
        # Also fill later slots, which later steps overwrite: with fewer steps than slots none is
        # empty.
        snapshots = jnp.where(slots >= i * num_snapshots // path.num_steps, x0, snapshots)
        return x, states, snapshots

    x = noise if init_noise == "unit" else path.levels(0)[2] * noise
    if init is not None and init.has_noise:
        x = init.x0
    elif init is not None:
        x = jnp.where((first_step == 0) & init.from_noise, x, path.noised(first_step))
    carry = init_loop_state(denoiser, solver, x, num_snapshots)
    begin, end = first_step, path.num_steps
    if segment is not None:
        begin, end = segment.begin, segment.end
        carry = jax.tree.map(
            lambda a, b: jnp.where(begin == first_step, a, b), carry, segment.state
        )
    carry = jax.lax.fori_loop(begin, end, body, carry)
    return Sampled(images=carry[0], snapshots=carry[2], state=carry)


class _Path(NamedTuple):
    """The times, noise and initial latents of a run."""

    schedule: Schedule
    grid: Grid
    num_steps: Int[Array, ""]
    num_tokens: int
    noise: Images
    init: InitLatents | None

    def levels(self, i: int | Int[Array, ""]) -> tuple[Scalar, Scalar, Scalar]:
        """Return t, alpha and sigma before step i."""
        t = self.grid(jnp.asarray(i), self.num_steps, self.num_tokens).astype(self.noise.dtype)
        return t, self.schedule.alpha(t), self.schedule.sigma(t)

    def noised(self, i: int | Int[Array, ""]) -> Images:
        """Return the initial x0 with the noise before step i; without any after the last step."""
        assert self.init is not None
        _, alpha, sigma = self.levels(i)
        x0 = self.init.x0
        return jnp.where(i < self.num_steps, alpha * x0 + sigma * self.noise, x0)


def _step(
    denoiser: StatefulDenoiser,
    solver: Solver,
    path: _Path,
    i: Int[Array, ""],
    x: Images,
    states: tuple[SolverState, State],
    keys: Key[Array, " b"],
    resample_steps: int,
) -> tuple[Images, Images, tuple[SolverState, State]]:
    """Take step i `resample_steps` times; return x, the estimate of x0, and the next states."""
    step, init = Step(*path.levels(i), *path.levels(i + 1)), path.init

    def take(x, states, keys):
        out = solver.step(denoiser.denoise, x, states[0], states[1], step, keys)
        x = out.x
        if init is not None and init.mask is not None:
            x = init.mask * x + (1 - init.mask) * path.noised(i + 1)
        return x, out.x0, (out.solver_state, out.state)

    def resample(j, carry):
        fresh_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, j)
        x = _renoise(carry[0], step, fresh_keys)
        states = solver.init(x), denoiser.init_state(x)  # earlier states belong to another path
        return take(x, states, fresh_keys)

    taken = take(x, states, keys)
    if resample_steps > 1:
        taken = jax.lax.fori_loop(1, resample_steps, resample, taken)
    return taken


def _renoise(x: Images, s: Step, keys: Key[Array, " b"]) -> Images:
    """Return from the end of a step to its start by independent noise.

    Eq. 1 of `process` between the two times, with the original proportion of data.
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    shrink = s.alpha / s.next_alpha
    fresh = jnp.sqrt(jnp.maximum(s.sigma**2 - (shrink * s.next_sigma) ** 2, 0))
    return shrink * x + fresh * noise_like(x, keys)
