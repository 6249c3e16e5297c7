"""Averages whose width is chosen after training: profiles, reconstruction, snapshots of a run."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.planning.plan import count_params, state_bytes_per_device
from jaxdiff.pretrained import checkpoint_folder
from jaxdiff.pretrained.checkpoint_folder import load_params
from jaxdiff.training.abstract import abstract_state
from jaxdiff.training.ema import Ema
from jaxdiff.training.loop import train
from jaxdiff.training.post_hoc_ema import (
    SNAPSHOTS,
    PostHocEma,
    Snapshots,
    StoredAverages,
    coefficients,
    gamma_of,
)

STEPS, EVERY = 400, 20


def profile(width: float, steps: int, length: int = STEPS) -> np.ndarray:
    """Weights of the parameters after each step in the average after `steps`, in closed form."""
    ends = np.minimum(np.arange(length + 1) / steps, 1)
    return np.diff(ends ** (gamma_of(width) + 1))


@pytest.fixture(scope="module")
def trajectory() -> np.ndarray:
    """Parameters after each step: a random walk that decays from its start."""
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(0, 0.02, (STEPS, 100)), 0) + rng.normal(size=100)
    return walk + np.exp(-np.arange(STEPS) / STEPS * 5)[:, None] * rng.normal(size=100)


@functools.cache
def stepper(settings: PostHocEma):
    """The update over all steps, with the averages after each."""

    def body(averages, inputs):
        params, step = inputs
        averages = settings.update(averages, {"w": params}, step)
        return averages, averages

    return jax.jit(lambda start, all: jax.lax.scan(body, start, (all, jnp.arange(len(all))))[1])


def tracked(settings: PostHocEma, trajectory: np.ndarray):
    """The averages after every step, and those of the initial parameters, which are others."""
    start = settings.init({"w": jnp.full(trajectory.shape[1], 3, jnp.bfloat16)})
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(start))
    return stepper(settings)(start, jnp.asarray(trajectory, jnp.float32))


@pytest.mark.parametrize("width", [0.001, 0.05, 0.1, 0.28])
def test_the_exponent_gives_the_width_of_the_profile(width):
    gamma = gamma_of(width)
    mean = (gamma + 1) / (gamma + 2)
    assert np.sqrt((gamma + 1) / (gamma + 3) - mean**2) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize("width", [0.02, 0.28])
def test_an_average_has_its_closed_form_and_forgets_the_initial_parameters(width, trajectory):
    settings = PostHocEma(widths=(width,))
    [average] = tracked(settings, trajectory).values()
    for steps in (1, 7, STEPS):
        expected = profile(width, steps) @ trajectory
        np.testing.assert_allclose(average["w"][steps - 1], expected, rtol=1e-4, atol=1e-5)


def test_late_in_a_run_an_update_has_its_share():
    settings, late = PostHocEma(widths=(0.05,)), 10**7
    zero = settings.init({"w": jnp.zeros(())})
    [moved] = settings.update(zero, {"w": jnp.ones(())}, late - 1).values()
    assert float(moved["w"]) == pytest.approx((gamma_of(0.05) + 1) / late, rel=1e-5)


@pytest.fixture(scope="module")
def stored(trajectory, tmp_path_factory) -> dict[str, StoredAverages]:
    """The averages of a trajectory as a run stores them, by type."""
    settings = PostHocEma(snapshot_every=EVERY, dtype="float32")
    averages, found = tracked(settings, trajectory), {}
    for dtype in ("float32", "float16"):
        folder = epath.Path(tmp_path_factory.mktemp(dtype))
        with Snapshots(folder, dataclasses.replace(settings, dtype=dtype), pytest.fail) as written:
            for step in range(EVERY, STEPS + 1, EVERY):
                written.after(step, jax.tree.map(lambda x, i=step - 1: x[i], averages))
        found[dtype] = StoredAverages(folder, pytest.fail)
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("float16", 2e-3)])
@pytest.mark.parametrize("width", [0.03, 0.05, 0.07, 0.15, 0.2])
def test_a_reconstruction_is_the_average_computed_directly(
    width, dtype, tolerance, trajectory, stored
):
    direct = profile(width, STEPS) @ trajectory
    found = stored[dtype].of_width(width)["w"]
    assert found.dtype == np.float32
    assert np.linalg.norm(found - direct) < tolerance * np.linalg.norm(direct)


def test_constant_weights_are_reproduced_from_two_snapshots():
    found = coefficients(np.array([5.0, 10.0]), np.array([0.1, 0.1]), at=10, width=0.25)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_a_stored_average_is_its_own_reconstruction():
    times, widths = np.repeat([10.0, 20.0, 30.0], 2), np.tile([0.05, 0.1], 3)
    found = coefficients(times, widths, at=30, width=0.1)
    np.testing.assert_allclose(found, [0, 0, 0, 0, 0, 1], atol=1e-9)


@pytest.mark.parametrize("widths", [(), (0.1, 0.1)])
def test_widths_are_different(widths):
    with pytest.raises(UserError, match="one or more different numbers"):
        PostHocEma(widths=widths)


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    settings = PostHocEma(snapshot_every=3, dtype="float32")
    return dataclasses.replace(tiny_recipe(steps=8), ema=Ema(post_hoc=settings))


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(recipe, folder, log=lambda _: None)


def test_a_run_writes_snapshots_at_intervals_and_at_its_end(straight):
    folder, result = straight
    assert checkpoint_folder.steps(epath.Path(folder) / SNAPSHOTS) == [3, 6, 8]
    averages = StoredAverages(folder, pytest.fail)
    assert averages.last_step == 8
    found = averages.of_width(0.1)
    jax.tree.map(np.testing.assert_array_equal, found, result.state.averages["width_0.1"])


@pytest.mark.slow
def test_a_run_of_another_start_ends_with_the_same_averages(straight, recipe, tmp_path):
    """It resumes at step 6, whose snapshot was lost, and gives the same bits."""
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    shutil.rmtree(folder / "checkpoints" / "8")
    for step in (6, 8):
        shutil.rmtree(folder / SNAPSHOTS / str(step))
    result = train(recipe, folder, log=lambda _: None)
    assert result.summary["fingerprint"] == straight[1].summary["fingerprint"]
    first, second = (StoredAverages(f, pytest.fail).of_width(0.15) for f in (straight[0], folder))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.nightly
def test_a_sharded_run_has_the_averages_of_one_device(straight, recipe, tmp_path):
    mesh = MeshConfig(data=4, fsdp=2)
    config = dataclasses.replace(recipe, mesh=mesh)
    result = train(config, tmp_path, log=lambda _: None)
    [kernel] = {
        leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(result.state.averages["width_0.05"])
        if jax.tree_util.keystr(path).endswith("['patch']['kernel']")
    }
    assert "fsdp" in kernel
    first, second = (StoredAverages(f, pytest.fail).of_width(0.08) for f in (straight[0], tmp_path))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-3)
    jax.tree.map(close, first, second)


def test_plans_count_the_averages_of_recipes_that_have_some(recipe):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    without = dataclasses.replace(recipe, ema=Ema())
    more = state_bytes_per_device(recipe, mesh) - state_bytes_per_device(without, mesh)
    result = jax.eval_shape(recipe.task.init_params, nnx.Rngs(0))
    assert more == 2 * 4 * count_params(result)


def test_a_run_without_averages_has_none(tiny_recipe, tmp_path):
    assert abstract_state(tiny_recipe()).averages == {}
    with Snapshots(epath.Path(tmp_path), None, pytest.fail) as snapshots:
        snapshots.after(1000, {})
    with pytest.raises(UserError, match="has no snapshots of averages"):
        StoredAverages(tmp_path, pytest.fail)


def test_damaged_snapshots_are_reported_and_left_out(straight, tmp_path):
    shutil.copytree(straight[0] / SNAPSHOTS, tmp_path / SNAPSHOTS)
    (tmp_path / SNAPSHOTS / "8" / "arrays.json").write_text("{}")
    reports = []
    averages = StoredAverages(tmp_path, reports.append)
    assert averages.last_step == 6
    assert len(reports) == 1
    assert "8 is damaged" in reports[0]
    assert load_params(straight[0] / "checkpoints")[1] == 8
