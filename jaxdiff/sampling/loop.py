"""The one sampling loop, and where its randomness comes from.

An image depends on its seed alone: the keys of image i are folded from (seeds[i], purpose, step),
so neither its place in the batch nor the size of the batch matters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from jaxdiff.diffusion.process import Images
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.sampling.solvers_ode import Solver, Step, noise_like
from jaxdiff.sampling.stateful_denoiser import AnyDenoise, OneStep, remembering

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


class Source(NamedTuple):
    """What an image is drawn from, in the space that is modelled.

    `mask` is 1 where it is drawn anew and 0 where it is kept; None draws all of it. Where it begins
    at the first step, `from_noise` says whether it begins at noise alone.
    """

    x0: Images
    mask: Float[Array, "b h w 1"] | None = None
    from_noise: bool = False


State = Any  # the tree of arrays that goes from step to step


class Part(NamedTuple):
    """The steps from `begin` to `end`, taken of a run that is taken in several parts.

    `state` is what the part before left behind; the part that begins at the run's first step takes
    no notice of what is in it.
    """

    begin: Int[Array, ""]
    end: Int[Array, ""]
    state: State


class Sampled(NamedTuple):
    """What a run of the sampler made, or a part of one."""

    images: Images
    snapshots: Float[Array, "k b h w c"]  # estimates of x0 on the way, first to last
    state: State  # for the part that comes after it


def sample(
    denoise: AnyDenoise,
    solver: Solver,
    schedule: Schedule,
    grid: Grid,
    num_steps: int | Int[Array, ""],
    noise: Images,
    seeds: Integer[Array, " b"],
    *,
    unit_noise: bool = False,
    num_snapshots: int = 0,
    source: Source | None = None,
    first: int | Int[Array, ""] = 0,
    repeats: int = 1,
    part: Part | None = None,
) -> Sampled:
    """Goes from noise at grid(0) to an image at grid(num_steps), or takes a `part` of the way.

    With a `source` it begins at grid(first), from the source under as much noise (SDEdit, Meng et
    al. 2022, algorithm 1). What its mask keeps is, after each step, the source under the noise of
    that time (Lugmayr et al. 2022, RePaint, eq. 8, with one noise for all times). Each step is
    taken `repeats` times (static), going back up by fresh noise in between (section 4.2 there, and
    Bansal et al. 2023, section 3.4), so that what is drawn comes to fit what is kept or asked for.

    num_steps, first and part may be traced: under jit neither they nor the seeds, nor anything that
    `denoise` closes over as an array, recompiles. noise has unit variance (`noise_from_seeds`) and
    is scaled to the sigma of grid(0), unless `unit_noise`; seeds feed the solvers that add more. Of
    the k = num_snapshots (static), number j is the denoiser's estimate after a share (j + 1) / k of
    the steps, so the last is of the last step.
    """
    num_steps = jnp.asarray(num_steps, jnp.int32)
    keys = keys_from_seeds(seeds, STEP_NOISE)
    denoiser = remembering(denoise)
    slots = jnp.arange(num_snapshots).reshape(-1, 1, 1, 1, 1)

    def init(x):
        return solver.init(x), denoiser.init(x)

    def levels(i):
        t = grid(i, num_steps).astype(noise.dtype)
        return t, schedule.alpha(t), schedule.sigma(t)

    def body(i, state):
        x, memory, snapshots = state
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        step = Step(*levels(i), *levels(i + 1))

        def take(x, memory, keys):
            call = OneStep(denoiser, memory[1])
            x, x0, solved = solver.step(call, x, memory[0], step, keys)
            if source is not None and source.mask is not None:
                x = source.mask * x + (1 - source.mask) * noised(i + 1)
            return x, x0, (solved, call.memory)

        def again(j, state):
            keys = jax.vmap(jax.random.fold_in, (0, None))(step_keys, j)
            x = _back_up(state[0], step, keys)
            return take(x, init(x), keys)  # what was remembered is of another path

        x, x0, memory = take(x, memory, step_keys)
        if repeats > 1:
            x, x0, memory = jax.lax.fori_loop(1, repeats, again, (x, x0, memory))
        # Written to the slots yet to come as well, which later steps overwrite: with fewer steps
        # than slots none stays empty.
        snapshots = jnp.where(slots >= i * num_snapshots // num_steps, x0, snapshots)
        return x, memory, snapshots

    def noised(i):
        """The source at the time before step i; after the last as it is, wherever the grid ends."""
        assert source is not None
        _, alpha, sigma = levels(i)
        return jnp.where(i < num_steps, alpha * source.x0 + sigma * noise, source.x0)

    x = noise if unit_noise else levels(0)[2] * noise
    if source is not None:
        x = jnp.where((first == 0) & source.from_noise, x, noised(first))
    snapshots = jnp.zeros((num_snapshots, *noise.shape), noise.dtype)
    state, begin, end = (x, init(x), snapshots), first, num_steps
    if part is not None:
        begin, end = part.begin, part.end
        state = jax.tree.map(lambda a, b: jnp.where(begin == first, a, b), state, part.state)
    state = jax.lax.fori_loop(begin, end, body, state)
    return Sampled(images=state[0], snapshots=state[2], state=state)


def _back_up(x: Images, s: Step, keys: Key[Array, " b"]) -> Images:
    """From the end of a step to its beginning, by noise that has nothing to do with what was there.

    Eq. 1 of `process.py` between two times: what is left of the data is as much as there was.
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    left = s.alpha / s.next_alpha
    rest = jnp.sqrt(jnp.maximum(s.sigma**2 - (left * s.next_sigma) ** 2, 0))
    return left * x + rest * noise_like(x, keys)
