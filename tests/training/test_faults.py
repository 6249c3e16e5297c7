"""Killed runs lose only the steps since the last checkpoint and resume bit-exactly."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from etils import epath

from jaxdiff.training.recipe import Config

pytestmark = pytest.mark.nightly

STEPS = 100


def recipe_of(tiny_recipe, *, steps=STEPS, workers=0, every=2) -> Config:
    recipe = tiny_recipe(steps=steps, checkpoint_every=every)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=workers))


@pytest.fixture(scope="module")
def uninterrupted(launch, tiny_recipe, tmp_path_factory):
    """A run without interruption."""
    run = launch(tmp_path_factory.mktemp("uninterrupted"), recipe_of(tiny_recipe))
    assert run.wait() == [0], run.said()
    return run


@pytest.mark.parametrize(("kills", "workers"), [(20, 0), (6, 2)])
def test_a_run_killed_at_random_moments_ends_in_the_same_state(
    uninterrupted, launch, tiny_recipe, tmp_path, kills, workers
):
    """Killed during start-up, steps and saves; with data workers and without."""
    moments = random.Random(kills)
    config, step, cut_short = recipe_of(tiny_recipe, workers=workers), 0, 0
    for kill in range(kills):
        run = launch(tmp_path, config)
        if kill % 5 == 4:
            time.sleep(moments.uniform(0, 10))
        else:
            step += moments.randint(1, 4)
            run.until_step(step)
            time.sleep(moments.uniform(0, 0.1))
        run.send(signal.SIGKILL)
        assert run.wait() == [-signal.SIGKILL], run.said()
        checkpoints = run.out / "checkpoints"
        if checkpoints.exists():
            cut_short += any(not path.name.isdecimal() for path in checkpoints.iterdir())
    run = launch(tmp_path, config)
    assert run.wait() == [0], run.said()
    print(f"{kills} kills until step {step}, {cut_short} of them during a save")
    assert run.summary()["fingerprint"] == uninterrupted.summary()["fingerprint"]
    figures = ("step", "loss", "grad_norm", "learning_rate")
    actual, expected = (
        [[r[f] for f in figures] for r in x.records()] for x in (run, uninterrupted)
    )
    assert actual == expected


@pytest.fixture
def bucket(free_port, tmp_path, monkeypatch):
    """A bucket of an emulated cloud storage, from the extra `nightly`."""
    port = free_port()
    for name in (  # read by fsspec, ArrayRecord and TensorStore
        "STORAGE_EMULATOR_HOST",
        "CLOUD_STORAGE_EMULATOR_ENDPOINT",
        "TENSORSTORE_GCS_HTTP_URL",
    ):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for credentials
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    flags = [
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
        "--in-memory",
        "--default-bucket=bucket",
    ]
    command = [sys.executable, "-m", "gcp_storage_emulator", *flags]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as emulator:
        try:
            for _ in range(100):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/storage/v1/b/bucket")
                    break
                except OSError:
                    time.sleep(0.1)
            yield "gs://bucket"
        finally:
            emulator.kill()


def test_a_run_on_cloud_storage_resumes_after_a_kill(
    uninterrupted, launch, tiny_recipe, tmp_path, bucket
):
    config, out = recipe_of(tiny_recipe, every=20), epath.Path(bucket) / "run"
    run = launch(tmp_path, config, "--out", str(out))
    run.until(lambda: (out / "checkpoints/40/SHA256SUMS").exists())
    run.send(signal.SIGKILL)
    assert run.wait() == [-signal.SIGKILL], run.said()
    run = launch(tmp_path, config, "--out", str(out))
    assert run.wait() == [0], run.said()
    assert "Resuming at step" in run.said()
    found = json.loads((out / "summary.json").read_text())
    assert found["fingerprint"] == uninterrupted.summary()["fingerprint"]
