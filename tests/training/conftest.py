"""Runs as users start them: processes of `train.py`, alone or several of them joined."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from jaxdiff.config.serialization import to_json
from jaxdiff.training.recipe import Config

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = """
import json, pathlib
from jaxdiff.training.recipe import config_from_json

def get_config():
    return config_from_json(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))
"""


@dataclasses.dataclass
class Launched:
    """The processes of one run, their output, and the folder that they write."""

    folder: pathlib.Path
    processes: list[subprocess.Popen]
    logs: list[pathlib.Path]

    @property
    def out(self) -> pathlib.Path:
        return self.folder / "run"

    def said(self, host: int = 0) -> str:
        return self.logs[host].read_text()

    def records(self) -> list[dict]:
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def summary(self) -> dict:
        return json.loads((self.out / "summary.json").read_text())

    def wait(self, seconds: float = 1500) -> list[int]:
        """The exit statuses; fails if they do not come in time."""
        deadline = time.monotonic() + seconds
        statuses = []
        for process in self.processes:
            try:
                statuses.append(process.wait(max(deadline - time.monotonic(), 0.01)))
            except subprocess.TimeoutExpired:
                pytest.fail(f"still running after {seconds} s: {self.said()[-2000:]}")
        return statuses

    def until(self, there: Callable[[], bool], seconds: float = 1500) -> None:
        """Returns once something is so; fails if a process ends before, or it takes too long."""
        deadline = time.monotonic() + seconds
        while not there():
            for host, process in enumerate(self.processes):
                assert process.poll() is None, self.said(host)[-3000:]
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.005)

    def until_step(self, step: int) -> None:
        self.until(lambda: any(record["step"] >= step for record in self.records()))

    def send(self, number: signal.Signals, host: int | None = None) -> None:
        for process in self.processes if host is None else [self.processes[host]]:
            process.send_signal(number)


@pytest.fixture(scope="module")
def launch(free_port) -> Iterator[Callable[..., Launched]]:
    """`launch(folder, config, hosts=2, devices=1)` starts or resumes a run in `folder / "run"`."""
    started: list[subprocess.Popen] = []

    def start(
        folder: pathlib.Path,
        config: Config,
        *flags: str,
        hosts: int = 1,
        devices: int = 1,
        code: str = "train.py",
    ) -> Launched:
        folder.mkdir(exist_ok=True)
        (folder / "recipe.py").write_text(RECIPE)
        (folder / "recipe.json").write_text(json.dumps(to_json(config)))
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"]),
        }
        if hosts > 1:  # one alone would find its programs, and not wait for the others
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [sys.executable, code, str(folder / "recipe.py"), "--out", str(folder / "run")]
        address = f"127.0.0.1:{free_port()}"
        launched = Launched(folder, [], [])
        for index in range(hosts):
            joined = [f"--hosts.address={address}", f"--hosts.count={hosts}"]
            joined = [*joined, f"--hosts.index={index}"] if hosts > 1 else []
            log = folder / f"log_{index}.txt"
            with log.open("w") as file:
                process = subprocess.Popen(
                    [*command, *joined, *flags],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            started.append(process)
            launched.processes.append(process)
            launched.logs.append(log)
        return launched

    yield start
    for process in started:
        process.kill()
        process.wait()
