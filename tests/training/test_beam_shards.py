"""Shards that Apache Beam's runner on this machine writes equal those of the local way."""

import importlib.util
import sys
from pathlib import Path

import pytest

from jaxdiff.data.loader import DataConfig
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError
from jaxdiff.training import beam_shards
from jaxdiff.training.prepare_shards import Sharing, write_records

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="needs the extra beam"
)
DATA = DataConfig(source=Produce(size=32, length=10), transforms=Transforms(size=32))
BEAM = {"runner": "DirectRunner"}


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def write(out, **sharing):
    return write_records(None, DATA, str(out), Sharing(shards=3, **sharing))


@needs_beam
@pytest.mark.nightly
def test_shards_and_manifest_are_those_of_the_local_way(tmp_path):
    write(tmp_path / "local", workers=0)
    write(tmp_path / "beam", **BEAM)
    assert files(tmp_path / "beam") == files(tmp_path / "local")


@needs_beam
@pytest.mark.nightly
def test_shards_that_are_complete_are_kept(tmp_path, monkeypatch):
    write_images, written = beam_shards.write_images, []

    def write_two(reader, job):
        if len(written) == 2:
            raise UserError("The disk is full.")
        written.append(job[1].number)
        return write_images(reader, job)

    monkeypatch.setattr(beam_shards, "write_images", write_two)
    with pytest.raises(UserError, match=r"^The disk is full\.$"):
        write(tmp_path / "beam", **BEAM)
    monkeypatch.setattr(beam_shards, "write_images", write_images)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "beam").glob("*.array_record")}
    assert len(kept) == 2
    write(tmp_path / "beam", **BEAM)
    write(tmp_path / "local", workers=0)
    assert files(tmp_path / "beam") == files(tmp_path / "local")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@needs_beam
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("sharing", "message"),
    [
        ({"runner": "NoRunner"}, "The runner NoRunner stopped: Unexpected pipeline runner"),
        ({**BEAM, "runner_options": ("--project=p",)}, "expected name=value"),
    ],
)
def test_unknown_runners_and_options_are_a_sentence(sharing, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write(tmp_path, **sharing)


def test_a_missing_package_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[beam\]'"):
        write(tmp_path, **BEAM)


@pytest.mark.parametrize(
    ("sharing", "message"),
    [
        ({**BEAM, "workers": 2}, "omit --workers"),
        ({**BEAM, "hosts": 2}, "omit --workers, --host and --hosts"),
        ({"runner_options": ("a=b",)}, "has no effect without --runner"),
    ],
)
def test_settings_that_contradict_a_runner_are_refused(sharing, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write(tmp_path, **sharing)
