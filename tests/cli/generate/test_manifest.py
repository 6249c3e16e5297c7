import hashlib
import json

import pytest
from etils import epath

from jaxdiff.cli.generate.manifest import MANIFEST, Manifest


def record(row, prompts="a.jsonl", **more):
    return {"prompts": prompts, "row": row, "file": f"{row:04d}.png", "seed": 0, **more}


def lines(folder):
    return [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    """Three images of `a.jsonl`, as left by a process that was killed after the last of them."""
    folder = epath.Path(tmp_path)
    manifest = Manifest(folder, "a.jsonl", [record(i) for i in range(4)])
    for i in (2, 0, 1):
        manifest.add(record(i), b"pixels %d" % i, 0.5)
    return folder


def test_a_line_follows_its_file_and_states_its_hash(folder):
    assert [line["row"] for line in lines(folder)] == [2, 0, 1]
    assert (folder / "0002.png").read_bytes() == b"pixels 2"
    assert lines(folder)[0]["seconds"] == 0.5
    digest = hashlib.sha256(b"pixels 2").hexdigest()
    assert lines(folder)[0]["sha256"] == digest


def test_existing_images_are_known_at_the_next_start(folder):
    manifest = Manifest(folder, "a.jsonl", [record(i) for i in range(4)])
    assert [manifest.has(f"{i:04d}.png") for i in range(4)] == [True, True, True, False]
    manifest.close()
    assert [line["row"] for line in lines(folder)] == [0, 1, 2]


def test_a_truncated_last_line_is_ignored(folder):
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes()[:-5])
    manifest = Manifest(folder, "a.jsonl", [record(i) for i in range(4)])
    assert not manifest.has("0001.png")
    manifest.add(record(3), b"pixels 3", 0.5)
    manifest.close()
    assert [line["row"] for line in lines(folder)] == [0, 2, 3]


@pytest.mark.parametrize("change", ["delete", "change", "cut"])
def test_an_image_that_was_changed_is_not_there(folder, change):
    path = folder / "0001.png"
    if change == "delete":
        path.unlink()
    else:
        path.write_bytes(b"" if change == "cut" else b"pixels x")
    manifest = Manifest(folder, "a.jsonl", [record(i) for i in range(3)])
    assert [manifest.has(f"{i:04d}.png") for i in range(3)] == [True, False, True]


def test_a_row_that_was_changed_is_not_there(folder):
    wanted = [record(0), record(1, size=(32, 32)), record(2)]
    manifest = Manifest(folder, "a.jsonl", wanted)
    assert [manifest.has(f"{i:04d}.png") for i in range(3)] == [True, False, True]
    manifest.add(wanted[1], b"new", 0.1)
    # What JSON makes of a tuple is no change.
    again = Manifest(folder, "a.jsonl", wanted)
    assert again.has("0001.png")


def test_lines_of_another_file_of_prompts_stay(folder):
    other = record(7, prompts="b.jsonl")
    manifest = Manifest(folder, "b.jsonl", [other])
    manifest.add(other, b"b", 0.1)
    manifest.close()
    assert [(x["prompts"], x["row"]) for x in lines(folder)] == [
        ("a.jsonl", 0),
        ("a.jsonl", 1),
        ("a.jsonl", 2),
        ("b.jsonl", 7),
    ]


def test_lines_of_rows_that_are_gone_do_not_stay(folder):
    Manifest(folder, "a.jsonl", [record(0)]).close()
    assert [line["row"] for line in lines(folder)] == [0]


def test_a_damaged_manifest_is_ignored(folder):
    (folder / MANIFEST).write_bytes(b'\xff\n[1]\n{"file": 3}\n{"file": "../x"}\n')
    manifest = Manifest(folder, "a.jsonl", [record(0)])
    assert not manifest.has("0000.png")


@pytest.fixture
def shared(tmp_path):
    """Four images, two of each of two processes, which have not ended yet."""
    folder, wanted = epath.Path(tmp_path), [record(i) for i in range(5)]
    both = [Manifest(folder, "a.jsonl", wanted, process=i, processes=2) for i in range(2)]
    for i in (2, 0, 1, 3):
        both[i % 2].add(record(i), b"pixels %d" % i, 0.5)
    return folder, both


def test_the_lines_of_several_processes_are_merged(shared):
    folder, both = shared
    assert lines(folder) == []
    for manifest in reversed(both):
        manifest.close()
    assert [line["row"] for line in lines(folder)] == [0, 1, 2, 3]
    assert sorted(p.name for p in folder.iterdir())[-1] == MANIFEST  # no other one is left


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_images_of_killed_processes_are_known_to_any_number_of_processes(shared, processes):
    folder, _ = shared
    wanted = [record(i) for i in range(5)]
    for i in range(processes):
        manifest = Manifest(folder, "a.jsonl", wanted, process=i, processes=processes)
        assert [manifest.has(f"{i:04d}.png") for i in range(5)] == [True] * 4 + [False]
    assert sorted(line["row"] for line in lines(folder)) == [0, 1, 2, 3]
    assert not (folder / "manifest.1.jsonl").exists()
