"""Runs of several processes joined over gloo give the results of one process."""

import dataclasses
import signal
import time

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.evaluation.produce import ProduceAccuracy
from jaxdiff.evaluation.samples import SampleGrid
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.diffusion import Trainable

pytestmark = pytest.mark.nightly

STEPS = 40
BOUND = 60  # seconds within which the others end; an idle machine needs a few


def recipe_of(tiny_recipe, *, evaluate: bool = False) -> Config:
    """Sharded parameters and a frozen text encoder; `evaluate` adds sample grids and scores."""
    recipe = tiny_recipe(steps=STEPS, checkpoint_every=5)
    model = recipe.task.model
    sampler = dataclasses.replace(model.sampler, num_steps=2)
    prompts = ("a small red pea", "a blue pear", "a green tomato")
    evaluators = SampleGrid(prompts=prompts, every=20), ProduceAccuracy(samples=2)
    return dataclasses.replace(
        recipe,
        task=dataclasses.replace(
            recipe.task,
            model=dataclasses.replace(model, sampler=sampler, image_size=64),
            trainable=Trainable(),
        ),
        data=dataclasses.replace(
            recipe.data, source=Produce(size=64, length=50), transforms=Transforms(size=64)
        ),
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=3e-4),
        mesh=MeshConfig(data=-1, fsdp=2),
        evaluators=evaluators if evaluate else (),
    )


@pytest.fixture(scope="module")
def alone(launch, tiny_recipe, tmp_path_factory):
    """A run of one process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    run = launch(folder, recipe_of(tiny_recipe, evaluate=True), devices=4)
    assert run.wait() == [0], run.said()
    return run


@pytest.fixture(scope="module")
def pair(launch, tiny_recipe, tmp_path_factory):
    """The same run of two processes with two devices each."""
    folder = tmp_path_factory.mktemp("pair")
    run = launch(folder, recipe_of(tiny_recipe, evaluate=True), hosts=2, devices=2)
    assert run.wait() == [0, 0], run.said() + run.said(1)
    return run


def assert_same_curve(run, alone) -> None:
    # Reports of evaluators have lines of their own.
    actual, expected = ([r for r in x.records() if "loss" in r] for x in (run, alone))
    assert [r["step"] for r in actual] == [r["step"] for r in expected] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm"):
        a, b = ([r[name] for r in records] for records in (actual, expected))
        print(f"{name} differs by up to {np.max(np.abs(np.divide(a, b) - 1)):.1e}")
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_two_processes_train_sample_and_score_like_one(pair, alone):
    assert_same_curve(pair, alone)
    for step in (20, 40):
        a, b = (
            np.asarray(Image.open(run.out / "samples" / f"step_{step:06d}.png")).astype(int)
            for run in (pair, alone)
        )
        assert np.abs(a - b).max() <= 2
    scores = [run.summary()["evaluation"] for run in (pair, alone)]
    assert scores[0].keys() == scores[1].keys() != set()
    files = [sorted(path.name for path in run.out.iterdir()) for run in (pair, alone)]
    assert files[0] == files[1]


def test_only_host_0_logs(pair):
    assert "Finished at step 40" in pair.said(0)
    lines = [line for line in pair.said(1).splitlines() if not line.startswith("[Gloo]")]
    assert not any("step" in line for line in lines), lines


def test_four_processes_train_like_one(launch, tiny_recipe, alone, tmp_path):
    run = launch(tmp_path, recipe_of(tiny_recipe), hosts=4)
    assert run.wait() == [0] * 4, run.said() + run.said(3)
    assert_same_curve(run, alone)


def test_a_killed_process_ends_the_other_and_the_run_resumes_exactly(
    launch, tiny_recipe, pair, tmp_path
):
    for victim, step in ((1, 8), (0, 18)):
        run = launch(tmp_path, recipe_of(tiny_recipe), hosts=2, devices=2)
        run.until_step(step)
        run.send(signal.SIGKILL, victim)
        start = time.monotonic()
        statuses = run.wait(BOUND)
        print(f"host {victim} killed, the other ended after {time.monotonic() - start:.1f} s")
        assert statuses[victim] == -signal.SIGKILL
        assert statuses[1 - victim] not in (0, -signal.SIGKILL)
        log = run.said(1 - victim)
        assert "another host was lost" in log or "another task died" in log
    run = launch(tmp_path, recipe_of(tiny_recipe), hosts=2, devices=2)
    assert run.wait() == [0, 0], run.said() + run.said(1)
    assert run.summary()["fingerprint"] == pair.summary()["fingerprint"]


def test_a_run_resumes_on_any_number_of_hosts_and_devices(launch, tiny_recipe, alone, tmp_path):
    """8 devices, 2 hosts of 2, 1 device, 2 hosts of 4; SIGTERM to one host in between."""
    config = recipe_of(tiny_recipe)
    machines = (({"devices": 8}, 8), ({"hosts": 2, "devices": 2}, 18), ({"devices": 1}, 28))
    for machine, step in machines:
        meshed = MeshConfig(data=-1, fsdp=1 if machine["devices"] == 1 else 2)
        run = launch(tmp_path, dataclasses.replace(config, mesh=meshed), **machine)
        run.until_step(step)
        run.send(signal.SIGTERM, host=len(run.processes) - 1)
        assert run.wait() == [0] * len(run.processes), run.said()
        assert f"Stopped at step {run.records()[-1]['step']};" in run.said()
    run = launch(tmp_path, config, hosts=2, devices=4)
    assert run.wait() == [0, 0], run.said() + run.said(1)
    assert_same_curve(run, alone)
