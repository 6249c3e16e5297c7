"""Fixtures of `jaxdiff sample`: a tiny model on disk, and the command with it."""

import pathlib
from collections.abc import Callable

import jax
import pytest


@pytest.fixture(scope="session")
def model(tiny_bundle, tmp_path_factory) -> pathlib.Path:
    """The folder of the tiny model."""
    from jaxdiff.pretrained.bundle import write_bundle

    folder = tmp_path_factory.mktemp("model")
    write_bundle(folder, tiny_bundle, dtype="float32")
    return folder


@pytest.fixture
def one_device(monkeypatch) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


@pytest.fixture
def sample(one_device, model, tmp_path) -> Callable[..., int]:
    """`sample("a prompt", "--seed", 3)`: the exit status of `sample.py` with the tiny model."""
    from jaxdiff.cli import main as cli

    words = ("sample", "--model", str(model), "--out", str(tmp_path / "out"))
    return lambda *more: cli.main([*words, *map(str, more)])
