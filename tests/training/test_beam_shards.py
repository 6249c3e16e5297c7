"""Shards that Apache Beam writes have the bytes of the local way; JAXDIFF_NIGHTLY=1 runs it."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError
from jaxdiff.training import beam_shards, prepare_shards
from jaxdiff.training.prepare_shards import Sharing, write_records

BEAM = importlib.util.find_spec("apache_beam") is not None


def with_beam(test):
    """Mark a test that takes the time of Beam's import and start."""
    return pytest.mark.nightly(pytest.mark.skipif(not BEAM, reason="needs the extra beam")(test))


RUNNER = {"runner": "DirectRunner"}


def write(out, source=None, **sharing):
    source = source or Produce(size=32, length=10)
    data = DataConfig(source=source, transforms=Transforms(size=32))
    settings = {"workers": None if "runner" in sharing else 0, **sharing}
    return write_records(None, data, str(out), Sharing(shards=4, **settings))


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != ".jaxdiff-lock"}


@with_beam
def test_shards_and_manifest_are_those_of_the_local_way(tmp_path):
    write(tmp_path / "local")
    write(tmp_path / "beam", **RUNNER)
    assert files(tmp_path / "beam") == files(tmp_path / "local")


@with_beam
def test_only_missing_shards_are_written(tmp_path, monkeypatch):
    write(tmp_path)
    whole = files(tmp_path)
    (tmp_path / "records-00002-of-00004.array_record").unlink()
    written, write_with = [], beam_shards.write_with_beam

    def counted(job, todo, *rest):
        written.extend(part.number for part in todo)
        write_with(job, todo, *rest)

    monkeypatch.setattr(prepare_shards, "write_with_beam", counted)
    write(tmp_path, **RUNNER)
    assert written == [2]
    assert files(tmp_path) == whole


@with_beam
def test_rejects_are_in_the_manifest(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(10):
        Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a pea")
    (images / "3.png").write_bytes(b"no image")
    source = ImageFolder(path=str(images))
    local = write(tmp_path / "local", source)
    beam = write(tmp_path / "beam", source, **RUNNER)
    assert len(local.account.left_out.rejects) == 1
    assert files(tmp_path / "beam") == files(tmp_path / "local")
    assert beam.account == local.account
    assert "3.png" in capsys.readouterr().err


@with_beam
def test_an_unknown_runner_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"does not start 'NoRunner': .*DirectRunner"):
        write(tmp_path, runner="NoRunner")


@with_beam
def test_a_user_error_of_a_worker_is_one(tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("The disk is full: expected room; make some.")

    monkeypatch.setattr(beam_shards, "write_images", fail)
    with pytest.raises(UserError, match=r"^The disk is full: expected room; make some\.$"):
        write(tmp_path, **RUNNER)


@with_beam
def test_workers_that_write_elsewhere_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(beam_shards, "write_images", lambda *_: None)
    with pytest.raises(UserError, match=r"4 shards of DirectRunner are not in .*gs://"):
        write(tmp_path, **RUNNER)


def test_without_beam_the_error_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"apache-beam, .*: run pip install -e '\.\[beam\]'"):
        write(tmp_path, **RUNNER)


@pytest.mark.parametrize(
    ("sharing", "message"),
    [
        ({"runner_options": ("region=x",)}, "expected --runner"),
        ({"runner": "DirectRunner", "hosts": 2}, "no --hosts and no --workers"),
        ({"runner": "DirectRunner", "workers": 0}, "no --hosts and no --workers"),
        ({"runner": "DirectRunner", "runner_options": ("--region=x",)}, "expected NAME=VALUE"),
        ({"runner": "DirectRunner", "runner_options": ("region",)}, "expected NAME=VALUE"),
    ],
)
def test_settings_that_do_not_fit_a_runner_are_refused(sharing, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "out", **sharing)
    assert not (tmp_path / "out").exists()
