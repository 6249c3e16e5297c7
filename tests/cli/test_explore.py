import json
import re

import numpy as np
import pytest
from PIL import Image

from jaxdiff.cli import explore as command
from jaxdiff.cli import main as cli
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError
from jaxdiff.explore.spaces import read_clip

RECIPE = """
from jaxdiff.training.recipe import Config
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.loader import DataConfig
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.data.transforms import Transforms
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.training.tasks.autoencoder import AutoencoderTask


def get_config():
    return Config(
        name="tiny",
        task=AutoencoderTask(model=AutoencoderConfig()),
        data=DataConfig(source={source}, transforms=Transforms(size=48, flip=True)),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of rendered scenes and one invalid file, and the recipe that names it."""
    root = tmp_path_factory.mktemp("data")
    drawings = Produce(length=40)
    for i in range(24):
        record = drawings[i]
        Image.fromarray(record["image"]).save(root / f"{i:02}.png")
        (root / f"{i:02}.txt").write_text(record["captions"][0])
    (root / "05.png").write_bytes(b"no image")
    recipe = root / "recipe.py"
    recipe.write_text(RECIPE.format(source=f"ImageFolder(path={str(root)!r})"))
    return str(recipe)


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused("--x", "pea")`: the one-sentence error of the command, with exit status 2."""

    def run(*words: str) -> str:
        assert cli.main(["explore", *words, "--out", str(tmp_path / "map")]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert not (tmp_path / "map" / "index.html").exists()
        return error

    return run


def test_a_folder_of_images_becomes_figures_and_a_page(folder, tmp_path, capsys):
    out = tmp_path / "map"
    words = ["explore", folder, "--out", str(out), "--x", "a pea:a tomato", "--y", "pc1"]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert re.search(r"Skipped .*05\.png: .* cannot be decoded", captured.err)
    assert captured.out.split() == [
        str(out / name) for name in ("clip.png", "autoencoder.png", "index.html")
    ]
    assert sorted(path.name for path in out.iterdir()) == [
        "autoencoder.png",
        "clip.png",
        "index.html",
    ]
    for name in ("clip", "autoencoder"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 900
    text = (out / "index.html").read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert len(data["captions"]) == 23
    assert [space["name"] for space in data["spaces"]] == ["CLIP", "the autoencoder"]
    for space in data["spaces"]:
        assert {axis["key"] for axis in space["axes"]} == {
            "a pea:a tomato",
            "without a stem:with a stem",
            *command.LEARNED,
        }
        assert all(len(axis["values"]) == 23 for axis in space["axes"])


def test_a_recipe_may_be_given_by_its_name(refused, monkeypatch):
    def stop(config, *_):
        raise UserError(f"{config.name} was read.")

    monkeypatch.setattr(command, "read_records", stop)
    assert "produce was read." in refused("produce")


def test_a_missing_scikit_learn_is_reported_before_the_work(refused, monkeypatch):
    monkeypatch.setattr("jaxdiff.explore.tsne.find_spec", lambda name: None)
    monkeypatch.setattr(command, "load_recipe", None)
    monkeypatch.setattr(command, "read_config", None)
    assert "pip install -e '.[explore]'" in refused("produce")


def test_the_axis_between_two_colours_separates_objects_of_these_colours():
    clip, drawings = read_clip("shipped:produce_clip"), Produce(length=10_000, pair_fraction=0.0)
    chosen = [(i, drawings.scene(i).items[0].colour) for i in range(200)]
    chosen = [(i, colour) for i, colour in chosen if colour in ("red", "green")][:32]
    images = np.stack([drawings[i]["image"] for i, _ in chosen])
    scores = command._scores(clip, clip.images(images), {"g:r": ("green", "red")})["g:r"]
    red = np.array([colour == "red" for _, colour in chosen])
    assert min(red.sum(), (~red).sum()) > 8
    assert scores[red].min() > scores[~red].max()


@pytest.mark.parametrize("spec", ["pea", "small:", ":large", "same:same", "pc3"])
def test_an_invalid_axis_is_refused(spec, refused):
    assert "There is no axis" in refused("configs/produce.py", "--x", spec)


def test_attributes_of_scenes_are_refused_for_other_data(folder, refused):
    assert "The axis size is known only for synthetic produce" in refused(folder, "--x", "size")


@pytest.mark.parametrize("words", [("--samples", "9"), ("--samples", "100000"), ("--seed", "-1")])
def test_numbers_out_of_range_are_refused(words, refused):
    assert f"{words[0]} is {words[1]}" in refused("configs/produce.py", *words)


def test_models_of_the_wrong_kind_are_refused(refused):
    message = refused("configs/produce.py", "--clip", "shipped:produce")
    assert "expected a CLIP" in message
    message = refused("configs/produce.py", "--autoencoder", "shipped:produce_clip")
    assert "shipped:produce_clip is a ClipConfig without autoencoder" in message


def test_too_few_usable_images_are_refused(tmp_path, refused):
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
        (tmp_path / f"{i}.txt").write_text("a pea")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(source=f"ImageFolder(path={str(tmp_path)!r})"))
    assert "Only 0 of " in refused(str(recipe))
