"""The one sampling loop, and where its randomness comes from.

An image depends on its seed alone: the keys of image i are folded from (seeds[i], purpose, step),
so neither its place in the batch nor the size of the batch matters.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from jaxdiff.diffusion.process import Images
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.sampling.solvers import Denoise, Solver, Step

INITIAL_NOISE, STEP_NOISE = 0, 1  # what a key is for

Grid = Callable[[Int[Array, ""], Int[Array, ""]], Float[Array, ""]]  # (step, num_steps) -> t


def keys_from_seeds(seeds: Integer[Array, " b"], purpose: int) -> Key[Array, " b"]:
    """One key for each seed; the generator is named, so that no setting of JAX changes images."""
    keys = jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(seeds)
    return jax.vmap(jax.random.fold_in, (0, None))(keys, purpose)


def noise_from_seeds(seeds: Integer[Array, " b"], shape: tuple[int, int, int]) -> Images:
    """Standard normal noise [b, *shape], float32, in which each image depends on its seed alone."""
    keys = keys_from_seeds(seeds, INITIAL_NOISE)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


class Sampled(NamedTuple):
    """What a run of the sampler made."""

    images: Images
    snapshots: Float[Array, "k b h w c"]  # estimates of x0 on the way, first to last


def sample(
    denoise: Denoise,
    solver: Solver,
    schedule: Schedule,
    grid: Grid,
    num_steps: int | Int[Array, ""],
    noise: Images,
    seeds: Integer[Array, " b"],
    *,
    unit_noise: bool = False,
    num_snapshots: int = 0,
) -> Sampled:
    """Goes from noise at grid(0) to an image at grid(num_steps).

    num_steps may be traced: under jit neither it nor the seeds, nor anything that `denoise` closes
    over as an array, recompiles. noise has unit variance (`noise_from_seeds`) and is scaled to the
    sigma of grid(0), unless `unit_noise`; seeds feed the solvers that add more. Of the
    k = num_snapshots (static), number j is the denoiser's estimate after a share (j + 1) / k of the
    steps, so the last is of the last step.
    """
    num_steps = jnp.asarray(num_steps, jnp.int32)
    keys = keys_from_seeds(seeds, STEP_NOISE)
    slots = jnp.arange(num_snapshots).reshape(-1, 1, 1, 1, 1)

    def levels(i):
        t = grid(i, num_steps).astype(noise.dtype)
        return t, schedule.alpha(t), schedule.sigma(t)

    def body(i, state):
        x, memory, snapshots = state
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        x, x0, memory = solver.step(denoise, x, memory, Step(*levels(i), *levels(i + 1)), step_keys)
        # Written to the slots yet to come as well, which later steps overwrite: with fewer steps
        # than slots none stays empty.
        snapshots = jnp.where(slots >= i * num_snapshots // num_steps, x0, snapshots)
        return x, memory, snapshots

    x = noise if unit_noise else levels(0)[2] * noise
    snapshots = jnp.zeros((num_snapshots, *noise.shape), noise.dtype)
    x, _, snapshots = jax.lax.fori_loop(0, num_steps, body, (x, solver.init(x), snapshots))
    return Sampled(images=x, snapshots=snapshots)
