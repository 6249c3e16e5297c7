"""Shards made by hand or by a run: in order, resumable, shared by machines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.array_record import ArrayRecord
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError
from jaxdiff.training.prepare_shards import Sharing, write_records


def _data(length=10):
    return DataConfig(source=Produce(size=32, length=length), transforms=Transforms(size=32))


def _write(out, shards=4, length=10, **sharing):
    settings = Sharing(shards=shards, workers=0, **sharing)
    return write_records(None, _data(length), str(out), settings)


def _files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_shards_follow_the_source_and_the_manifest_lists_them(tmp_path):
    manifest = _write(tmp_path)
    assert [shard.records for shard in manifest.shards] == [2, 3, 2, 3]
    prepared = ArrayRecord(path=str(tmp_path))
    prepared.check()
    assert [prepared[i]["name"] for i in range(10)] == [f"produce/train/{i}" for i in range(10)]
    stated = json.loads((tmp_path / "manifest.json").read_text())
    assert (stated["records"], stated["rejected"]) == (10, 0)
    assert set(_files(tmp_path)) == {"manifest.json", *(s["file"] for s in stated["shards"])}


def test_missing_shards_are_written_again_with_the_same_bytes(tmp_path, monkeypatch):
    _write(tmp_path)
    whole = _files(tmp_path)
    lost, cut = sorted(tmp_path.glob("*.array_record"))[1:3]
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    rendered = []
    monkeypatch.setattr(
        Produce, "__getitem__", lambda s, i, f=Produce.__getitem__: (rendered.append(i), f(s, i))[1]
    )
    _write(tmp_path)
    assert rendered == [2, 3, 4, 5, 6]
    assert _files(tmp_path) == whole


@pytest.mark.slow
def test_a_killed_preparation_resumes_and_writes_the_same_bytes(recipe_of, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    recipe = recipe_of("Produce(size=32, length=600)")
    words = [sys.executable, "-m", "jaxdiff.cli.main", "prepare", recipe, str(out)]
    run = subprocess.Popen([*words, "--shards", "60", "--workers", "0"], stderr=subprocess.DEVNULL)
    while len(list(out.glob("*.array_record"))) < 2:
        assert run.poll() is None
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    there = len(list(out.glob("*.array_record")))
    assert 2 <= there < 60
    assert not (out / "manifest.json").exists()
    _write(out, 60, 600)
    _write(whole, 60, 600)
    assert {k: v for k, v in _files(out).items() if not k.startswith(".partial")} == _files(whole)


@pytest.mark.nightly
def test_processes_write_the_same_as_one(tmp_path):
    _write(tmp_path / "one")
    write_records(None, _data(), str(tmp_path / "two"), Sharing(shards=4, workers=2))
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def test_machines_divide_the_shards_and_the_last_one_lists_all(tmp_path):
    _write(tmp_path / "alone")
    assert _write(tmp_path / "shared", hosts=2, host=1) is None
    assert len(list((tmp_path / "shared").glob("*.array_record"))) == 2
    manifest = _write(tmp_path / "shared", hosts=2, host=0)
    assert manifest.records == 10
    alone = _files(tmp_path / "alone")
    assert {name: (tmp_path / "shared" / name).read_bytes() for name in alone} == alone


def test_settings_without_a_complete_shard_are_replaced_by_one_machine_alone(tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("No.")

    with monkeypatch.context() as patch:
        patch.setattr(Produce, "__getitem__", fail)
        with pytest.raises(UserError, match="No"):
            _write(tmp_path, length=9)
    with pytest.raises(UserError, match=r"source\.length is 9, now 10"):
        _write(tmp_path, hosts=2)
    assert _write(tmp_path).records == 10


def test_a_folder_of_other_records_is_left_alone(tmp_path):
    _write(tmp_path)
    before = _files(tmp_path)
    for change in ({"length": 9}, {"shards": 3}):
        with pytest.raises(UserError, match=r"made with other settings .* choose another folder"):
            _write(tmp_path, **change)
    assert _files(tmp_path) == before
