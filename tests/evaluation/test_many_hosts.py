"""Images scored by two processes, joined over gloo, have the figures of one process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxdiff.io.images import save_png

pytestmark = pytest.mark.nightly


def test_two_processes_score_images_like_one(free_port, tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("real", 11), ("made", 13)):
        for i in range(count):
            save_png(tmp_path / name / f"{i}.png", rng.integers(0, 256, (32, 40, 3), np.uint8))
    words = ["--images", "made", "--reference", "real", "--few"]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.getcwd(),
    }

    def start(out: str, *hosts: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "jaxdiff", "evaluate", *words, "--out", out, *hosts]
        return subprocess.Popen(command, cwd=tmp_path, env=environment)

    address = f"127.0.0.1:{free_port()}"
    hosts = ("--hosts.address", address, "--hosts.count", "2", "--hosts.index")
    runs = [start("alone"), *(start("pair", *hosts, str(i)) for i in range(2))]
    assert [run.wait() for run in runs] == [0, 0, 0]
    alone, pair = (
        json.loads((tmp_path / out / "evaluation.json").read_text()) for out in ("alone", "pair")
    )
    assert alone["figures"] == pair["figures"]
    assert alone["provenance"]["figures"] == pair["provenance"]["figures"]
