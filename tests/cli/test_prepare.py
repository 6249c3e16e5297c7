import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jaxdiff.cli import main as cli
from jaxdiff.cli.prepare import source_at
from jaxdiff.data.sources.array_record import ArrayRecord
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.sources.parquet import Parquet
from jaxdiff.data.sources.webdataset import WebDataset
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.training import prepare_shards as preparation
from jaxdiff.training.recipe import load_recipe


def test_prepared_records_are_the_sources_own(recipe, tmp_path, capsys):
    out = tmp_path / "new" / "records"
    assert cli.main(["prepare", recipe, str(out)]) == 0
    assert "4 records" in capsys.readouterr().out
    prepared, source = ArrayRecord(path=str(out)), Produce(size=32, length=4)
    prepared.check()
    assert len(prepared) == 4
    transform = load_recipe(recipe).data.transforms
    for i in range(4):
        assert prepared[i]["captions"] == source[i]["captions"]
        assert prepared[i]["name"] == source[i]["name"]
        pixels = (transform(r[i], np.random.default_rng(0))[0] for r in (prepared, source))
        np.testing.assert_array_equal(*pixels)


def test_prepare_takes_keys_of_the_recipe(recipe, tmp_path):
    assert cli.main(["prepare", recipe, str(tmp_path / "out"), "--data.source.length", "2"]) == 0
    assert len(ArrayRecord(path=str(tmp_path / "out"))) == 2


def test_a_word_is_the_name_of_a_recipe_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "produce", "scenes", "--data.source.length", "2"]) == 0
    assert len(ArrayRecord(path="scenes")) == 2
    (tmp_path / "produce").mkdir()
    (tmp_path / "produce" / "a.png").write_bytes(_png())
    (tmp_path / "produce" / "a.txt").write_text("an image")
    assert cli.main(["prepare", "produce", "photos"]) == 0
    assert ArrayRecord(path="photos")[0]["captions"] == ["an image"]


def test_prepare_refuses_invalid_options(recipe, tmp_path, refused):
    assert "data.source.length is 0" in refused(
        "prepare", recipe, str(tmp_path / "o"), "--data.source.length=0"
    )
    assert "cannot be written to as a folder" in refused("prepare", recipe, recipe)
    assert "output folder is missing" in refused("prepare", recipe)
    assert not (tmp_path / "o").exists()


def test_prepare_names_and_leaves_out_records_that_cannot_be_read(recipe_of, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text("an image")
    (images / "b.txt").write_bytes(b"\xff\xfe\xff")
    recipe = recipe_of(f"ImageFolder(path={str(images)!r})")
    assert cli.main(["prepare", recipe, str(tmp_path / "out")]) == 0
    assert "b.png" in capsys.readouterr().err
    assert len(ArrayRecord(path=str(tmp_path / "out"))) == 1


@pytest.fixture
def images(tmp_path, recipe_of):
    """`images(a=("bytes", "caption"), ...)`: the path of a recipe for a folder of such files."""

    def make(**files: tuple[bytes, str]) -> str:
        folder = tmp_path / "images"
        folder.mkdir()
        for name, (data, caption) in files.items():
            (folder / f"{name}.png").write_bytes(data)
            (folder / f"{name}.txt").write_text(caption)
        return recipe_of(f"ImageFolder(path={str(folder)!r})")

    return make


def _png(side=32):
    data = io.BytesIO()
    Image.new("RGB", (side, side)).save(data, "PNG")
    return data.getvalue()


def test_prepare_names_and_leaves_out_what_training_could_not_use(images, tmp_path, capsys):
    recipe = images(
        good=(_png(), "x"), bad=(b"no", "x"), large=(_png(64), "x"), untold=(_png(), "\n")
    )
    limit = ("--data.transforms.max-pixels", "2000")
    assert cli.main(["prepare", recipe, str(tmp_path / "out"), *limit]) == 0
    captured = capsys.readouterr()
    for name in ("bad.png: the image cannot be", "large.png: the image has", "untold.png: there"):
        assert name in captured.err
    assert "good.png" not in captured.err
    assert "Found 4 records, wrote 1 in 1 shard, left out 3:" in captured.out
    assert ArrayRecord(path=str(tmp_path / "out"))[0]["name"].endswith("good.png")


def test_prepare_refuses_data_without_usable_records(images, tmp_path, refused):
    recipe = images(a=(b"no", "x"), b=(b"no", "x"))
    assert "None of the 2 records is usable" in refused("prepare", recipe, str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("terminal", [False, True])
def test_prepare_shows_its_progress(recipe, tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(preparation, "console", lambda **to: Console(force_terminal=terminal, **to))
    assert cli.main(["prepare", recipe, str(tmp_path / "out"), "--shards", "2"]) == 0
    text = capsys.readouterr().err
    for part in ("record 4/4", "left"):
        assert part in text


def test_rejects_are_in_the_manifest_with_their_reasons(images, tmp_path):
    recipe = images(a=(_png(), "x"), b=(b"no", "x"), c=(_png(), "x"))
    assert cli.main(["prepare", recipe, str(tmp_path / "out"), "--shards", "2"]) == 0
    printed = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (printed["records"], printed["rejected"]) == (2, 1)
    (reject,) = [reject for shard in printed["shards"] for reject in shard["rejects"]]
    assert reject["name"].endswith("b.png")
    assert "the image cannot be decoded" in reject["reason"]
    assert printed["reasons"] == {reject["kind"]: 1}


def test_the_source_of_a_path_depends_on_its_files(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(_png())
    (photos / "a.txt").write_text("an image")
    assert cli.main(["prepare", str(photos), str(tmp_path / "out")]) == 0
    assert "Found 1 record, wrote 1 in 1 shard." in capsys.readouterr().out
    assert source_at(str(photos)) == ImageFolder(path=str(photos))
    assert source_at(str(tmp_path / "out")) == ArrayRecord(path=str(tmp_path / "out"))
    for name, kind in (("x.tar", WebDataset), ("x.parquet", Parquet)):
        (tmp_path / name).write_bytes(b"")
        assert source_at(str(tmp_path / name)) == kind(path=str(tmp_path / name))


def test_missing_paths_are_refused(tmp_path, refused):
    assert "does not exist: expected a recipe" in refused("prepare", str(tmp_path / "none"), "out")
    (tmp_path / "notes.txt").write_text("x")
    assert "nothing to prepare" in refused("prepare", str(tmp_path), "out")
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "a.txt").write_text("x")
    printed = refused("prepare", str(tmp_path), "out", "--latents.views", "1")
    assert "Latents need a recipe" in printed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.tar.gz", "is a compressed tar file"),
        ("a.heic", "a.heic: the format .heic is not supported"),
        ("a.png", "have no captions"),
        ("a.md", "contains nothing to prepare"),
    ],
)
def test_folders_without_a_record_are_refused_by_name(tmp_path, refused, name, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(b"x")
    assert message in refused("prepare", str(tmp_path / "data"), str(tmp_path / "out"))


def test_records_that_are_added_need_another_folder(tmp_path, refused, capsys):
    data, out = tmp_path / "data", str(tmp_path / "out")
    data.mkdir()
    for name in "ab":
        (data / f"{name}.png").write_bytes(_png())
        (data / f"{name}.txt").write_text("x")
        if name == "a":
            assert cli.main(["prepare", str(data), out]) == 0
            capsys.readouterr()
    assert "found is 1, now 2" in refused("prepare", str(data), out)


def test_invalid_options_of_sharing_are_refused(recipe, tmp_path, refused):
    for words, printed in (
        (("--shards", "0"), "--shards is 0"),
        (("--workers", "-1"), "--workers is -1"),
        (("--host", "1"), "--host 1 of --hosts 1"),
        (("--latents.views", "1"), "no autoencoder whose latents can be cached"),
    ):
        assert printed in refused("prepare", recipe, str(tmp_path / "out"), *words)
