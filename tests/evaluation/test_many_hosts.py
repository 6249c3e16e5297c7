"""Two processes, joined over gloo, generate and score images like one."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from jaxdiff.config.serialization import to_json
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.evaluation.clip_score import ClipScore
from jaxdiff.evaluation.feature_distance import FeatureDistance
from jaxdiff.evaluation.produce import ProduceAccuracy
from jaxdiff.io.images import save_png
from jaxdiff.pretrained.bundle import RECIPE, write_bundle, write_json

pytestmark = pytest.mark.nightly


@pytest.fixture
def evaluations(free_port, tmp_path):
    """`evaluations(words)`: what one process and a pair of processes write."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.getcwd(),
    }

    def start(words, out: str, *hosts: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "jaxdiff", "evaluate", *words, "--out", out, *hosts]
        return subprocess.Popen(command, cwd=tmp_path, env=environment)

    def run(words):
        hosts = ("--hosts.address", f"127.0.0.1:{free_port()}", "--hosts.count", "2")
        pair = [start(words, "pair", *hosts, "--hosts.index", str(i)) for i in range(2)]
        runs = [start(words, "alone"), *pair]
        assert [run.wait() for run in runs] == [0, 0, 0]
        return [
            json.loads((tmp_path / out / "evaluation.json").read_text())
            for out in ("alone", "pair")
        ]

    return run


def test_two_processes_score_images_like_one(evaluations, tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("real", 11), ("made", 13)):
        for i in range(count):
            save_png(tmp_path / name / f"{i}.png", rng.integers(0, 256, (32, 40, 3), np.uint8))
    alone, pair = evaluations(["--images", "made", "--reference", "real", "--few"])
    assert alone["figures"] == pair["figures"]
    assert alone["provenance"]["figures"] == pair["provenance"]["figures"]


def test_two_processes_generate_and_score_like_one(evaluations, tiny_bundle, tiny_recipe, tmp_path):
    """Five images, of which one process generates three and the other two."""
    spec = dataclasses.replace(tiny_bundle.spec, image_size=64)
    shapes = {jax.tree_util.keystr(k): x.shape for k, x in _leaves(spec.abstract_params())}
    assert shapes == {jax.tree_util.keystr(k): x.shape for k, x in _leaves(tiny_bundle.params)}
    write_bundle(tmp_path / "model", tiny_bundle._replace(spec=spec), dtype="float32")
    source = Produce(size=64, length=50)
    config = tiny_recipe()
    data = dataclasses.replace(config.data, source=source, transforms=Transforms(size=64))
    evaluators = ClipScore(), ProduceAccuracy(), FeatureDistance(few=True)
    task = dataclasses.replace(config.task, model=spec)
    config = dataclasses.replace(config, task=task, data=data, evaluators=evaluators)
    write_json(epath.Path(tmp_path) / "model" / RECIPE, to_json(config))
    alone, pair = evaluations(["model", "--samples", "5"])
    assert len(alone["figures"]) > 20
    assert pair["figures"] == pytest.approx(alone["figures"], rel=1e-3, abs=1e-3)
    assert alone["provenance"]["figures"] == pair["provenance"]["figures"]


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)
