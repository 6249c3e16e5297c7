"""`--reference`, its column in prompt files, and the reproduction of such images."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxdiff.cli import main as cli
from jaxdiff.io.image_files import read_image_text
from jaxdiff.pipelines.input_images import References
from jaxdiff.pipelines.load import load
from jaxdiff.pretrained.bundle import write_bundle
from tests.pipelines.test_references import flux_pipeline

PEA = "a small red pea"


@pytest.fixture(scope="module")
def flux_model(tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    write_bundle(folder, flux_pipeline(tiny_bundle).bundle, "float32")
    return folder


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"]
    for path, size in zip(paths, ((64, 72), (80, 64), (64, 72)), strict=True):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def sample_flux(flux_model, tmp_path):
    def run(*words):
        options = ("--model", str(flux_model), "--out", str(tmp_path / "out"), *words)
        return cli.main(["sample", *options])

    return run


def test_references_make_the_image_of_the_pipeline_again(
    sample_flux, flux_model, pictures, tmp_path, capsys
):
    a, b, _ = pictures
    assert sample_flux(PEA, "--reference", a, b, "--seed", "5") == 0
    file = tmp_path / "out" / "0000-a-small-red-pea.png"
    images = References(images=[np.asarray(Image.open(path)) for path in (a, b)])
    expected = load(flux_model)(PEA, seeds=5, init=images)[0]
    assert expected.shape == (64, 72, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(file)), expected)
    stated = json.loads(read_image_text(file)["settings"])["reference"]
    assert [one["file"] for one in stated] == ["a.png", "b.png"]

    again = ("--again", str(file))
    assert sample_flux(*again, "--reference", a, b) == 0
    assert "The same pixels." in capsys.readouterr().out
    for wrong in ((b, a), (a,)):
        assert sample_flux(*again, "--reference", *wrong) == 2
        assert "made from a.png, b.png: give those files in this" in capsys.readouterr().err
    assert sample_flux(*again) == 2


def test_a_prompt_file_names_references_of_its_folder(sample_flux, pictures, tmp_path, capsys):
    rows = [
        {"prompt": PEA, "reference": "a.png"},
        {"prompt": PEA, "reference": ["a.png", "b.png"]},
        {"prompt": PEA, "reference": "c.png", "size": "32x32"},
        {"prompt": PEA, "reference": "../a.png"},
        {"prompt": PEA, "reference": "missing.png"},
        {"prompt": PEA, "reference": ["a.png", "b.png", "c.png"]},
        {"prompt": PEA, "reference": "a.png", "init_image": "c.png"},
        {"prompt": PEA, "reference": []},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert sample_flux("--prompts", str(file)) == 1
    sizes = [Image.open(path).size for path in sorted((tmp_path / "out").glob("*.png"))]
    assert sizes == [(72, 64), (72, 64), (32, 32)]
    errors = capsys.readouterr().err
    for line, message in (
        (4, "reference is '../a.png', which leaves the folder"),
        (5, "missing.png"),
        (6, "There are 3 reference images: expected 1 to 2"),
        (7, "reference and init_image exclude each other"),
        (8, "reference is []: expected the paths of files"),
    ):
        assert f"line {line}: " in errors
        assert message in errors.replace("\n", " ")


def test_a_model_without_references_refuses_them_at_once(sample, pictures, capsys):
    assert sample(PEA, "--reference", pictures[0]) == 2
    assert "reads no reference images: expected none" in capsys.readouterr().err
