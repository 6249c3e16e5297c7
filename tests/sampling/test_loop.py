"""The loop: one compilation for all arguments, images that depend on their seed alone."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import Cosine, RectifiedFlow, VarianceExploding
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.sampling.guidance.cfg import ConditionedModel, guided_denoiser
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.loop import (
    INITIAL_NOISE,
    STEP_NOISE,
    keys_from_seeds,
    noise_from_seeds,
    sample,
)
from jaxdiff.sampling.solver import StepOutput, ddim_update, stateless
from jaxdiff.sampling.solvers_ode import DDIM, PLMS, Churn, DPMSolverPP2M, Euler, Heun
from jaxdiff.sampling.solvers_sde import LCM, DPMSolverPP2MSDE, DPMSolverPPSDE
from jaxdiff.sampling.unipc import UniPC

SHAPE = (4, 4, 3)
SOLVERS = [
    DDIM(eta=1.0),
    Euler(),
    Heun(),
    Heun(variable="sigma", churn=Churn(schedule=Cosine(), gamma=0.1)),
    DPMSolverPP2M(),
    DPMSolverPP2MSDE(),
    DPMSolverPPSDE(),
    UniPC(),
    UniPC(variant="bh1"),
    PLMS(),
    LCM(),
]


@dataclass(frozen=True, kw_only=True)
class ThirdParty:
    """A solver of someone else: DDIM with an average of the last two estimates."""

    weight: float = 0.5

    def init(self, x):
        return jnp.zeros_like(x), jnp.zeros((), bool)

    def step(self, denoise, x, solver_state, state, s, keys):
        last, is_known = solver_state
        x0, state = denoise(x, s.t, state)
        mean = jnp.where(is_known & (s.next_t > 0), x0 + self.weight * (last - x0), x0)
        solver_state = x0, jnp.ones((), bool)
        return StepOutput(ddim_update(x, mean, s), x0, solver_state, state)


# One of each kind: with fresh noise, of two evaluations, with a state, with a state of two parts.
KINDS = [SOLVERS[0], SOLVERS[3], DPMSolverPP2MSDE(), UniPC(), ThirdParty()]


def _network(x, t, cond):
    """Mixes pixels of one image, never two images."""
    mixed = jnp.tanh(x + jnp.roll(x, 1, axis=1) + cond[:, None, None, :])
    return mixed * jnp.cos(t).reshape(-1, 1, 1, 1)


def _images(solver, seeds, text, scale, num_steps, **fields):
    schedule = Cosine()
    model = ConditionedModel(
        network=_network,
        prediction="v",
        schedule=schedule,
        cond=text,
        uncond=jnp.zeros_like(text),
    )
    denoiser = guided_denoiser(model, Guidance(), scale)
    noise = noise_from_seeds(seeds, SHAPE)
    return sample(denoiser, solver, schedule, TimeGrid(), num_steps, noise, seeds, **fields)


@pytest.mark.parametrize("solver", KINDS, ids=repr)
def test_nothing_that_a_user_changes_recompiles(solver):
    traces = []

    @jax.jit
    def run(seeds, text, scale, num_steps):
        traces.append(None)
        return _images(solver, seeds, text, scale, num_steps).images

    first = run(jnp.array([1, 2]), jnp.ones((2, 3)), jnp.array([1.0, 2.0]), 10)
    for seeds, text, scale, num_steps in [
        ([3, 4], 1.0, [1.0, 2.0], 10),
        ([1, 2], 0.5, [1.0, 2.0], 10),
        ([1, 2], 1.0, [7.5, 0.0], 10),
        ([1, 2], 1.0, [1.0, 2.0], 25),
    ]:
        other = run(jnp.array(seeds), text * jnp.ones((2, 3)), jnp.array(scale), num_steps)
        assert not np.allclose(other, first)
    assert len(traces) == 1
    assert run._cache_size() == 1


@pytest.mark.parametrize("solver", KINDS, ids=repr)
def test_an_image_depends_on_its_seed_and_not_on_its_place(solver):
    seeds = jnp.array([11, 5, 7])
    text = jnp.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    scale = jnp.array([1.0, 2.0, 3.0])
    run = jax.jit(lambda *arguments: _images(solver, *arguments, 8).images)
    together = run(seeds, text, scale)
    turned = run(seeds[::-1], text[::-1], scale[::-1])
    np.testing.assert_allclose(turned[::-1], together, atol=1e-6)
    for i in range(3):
        alone = run(seeds[i : i + 1], text[i : i + 1], scale[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], atol=1e-6)


def test_noise_is_standard_normal():
    noise = noise_from_seeds(jnp.arange(500), (8, 8, 3))
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_keys_differ_by_seed_and_by_purpose():
    seeds = jnp.arange(100)
    keys = [jax.random.key_data(keys_from_seeds(seeds, p)) for p in (INITIAL_NOISE, STEP_NOISE)]
    assert len({tuple(key) for key in np.concatenate(keys)}) == 200


@pytest.mark.parametrize(
    ("solver", "schedule"),
    [(s, RectifiedFlow()) for s in SOLVERS] + [(s, VarianceExploding()) for s in KINDS],
    ids=repr,
)
def test_a_perfect_denoiser_ends_at_its_image(solver, schedule):
    target = jax.random.uniform(jax.random.key(0), (2, *SHAPE))
    noise = noise_from_seeds(jnp.arange(2), SHAPE)
    seeds = jnp.arange(2)

    @jax.jit
    def run(num_steps):
        return sample(
            stateless(lambda x, t: target), solver, schedule, TimeGrid(), num_steps, noise, seeds
        )

    for num_steps in (1, 2, 9):
        np.testing.assert_allclose(run(num_steps).images, target, atol=1e-4)


@pytest.mark.parametrize(("num_steps", "expected"), [(4, [1, 2, 3, 4]), (8, [2, 4, 6, 8])])
def test_snapshots_are_the_estimates_at_equal_fractions_of_the_steps(num_steps, expected):
    grid, noise, seeds = TimeGrid(), jnp.ones((1, 1, 1, 1)), jnp.array([0])

    def steps_taken(x, t):
        return jnp.broadcast_to((1 - t) * num_steps + 1, x.shape)

    sampled = sample(
        stateless(steps_taken),
        Euler(),
        RectifiedFlow(),
        grid,
        num_steps,
        noise,
        seeds,
        num_snapshots=4,
    )
    np.testing.assert_allclose(sampled.snapshots.ravel(), expected, rtol=1e-5)
    np.testing.assert_allclose(sampled.images, sampled.snapshots[-1], rtol=1e-6)


def test_fewer_steps_than_snapshots_leave_none_empty():
    seeds, text, scale = jnp.array([1]), jnp.ones((1, 3)), jnp.array([2.0])
    snapshots = _images(Euler(), seeds, text, scale, 3, num_snapshots=8).snapshots
    assert snapshots.shape == (8, 1, *SHAPE)
    assert jnp.all(jnp.std(snapshots, axis=(1, 2, 3, 4)) > 0)


def test_snapshots_do_not_change_the_image():
    arguments = Heun(), jnp.array([1]), jnp.ones((1, 3)), jnp.array([2.0]), 6
    with_them = _images(*arguments, num_snapshots=5).images
    np.testing.assert_allclose(with_them, _images(*arguments).images, atol=1e-6)
