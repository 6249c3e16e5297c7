import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from jaxdiff.evaluation.evaluate import check_scorable, evaluate, evaluate_folder, table

from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.openmoji import source as openmoji
from jaxdiff.datasets.openmoji.score import held_out_prompts
from jaxdiff.datasets.openmoji.source import OpenMoji
from jaxdiff.datasets.produce.rendering import render
from jaxdiff.datasets.produce.score import evaluation_scenes
from jaxdiff.datasets.produce.source import Produce, full_caption
from jaxdiff.errors import UserError
from jaxdiff.evaluation import evaluate as module
from jaxdiff.pipelines.pipeline import Best, Pipeline
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.training.recipe import Config

SAMPLES = 6
COLUMNS = ("score", "ceiling", "chance")


class Perfect(Pipeline):
    """In the place of a trained model, the true image of each prompt."""

    def __init__(self, config: Config, images: dict[str, np.ndarray]):
        self.config = config
        self.task = config.task
        self.images = images

    def __call__(self, prompts, **_) -> np.ndarray:
        return np.stack([self.images[prompt] for prompt in prompts])


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    """`recipe(source, size)`: the tiny recipe on other data."""

    def make(source, size: int = 64) -> Config:
        config = tiny_recipe()
        data = dataclasses.replace(config.data, source=source, transforms=Transforms(size=size))
        return dataclasses.replace(config, data=data)

    return make


@pytest.fixture(scope="module")
def produce(recipe) -> Perfect:
    images = {
        full_caption(scene): render(scene, np.random.default_rng(i))
        for split, kind in (("held_out", "single"), ("train", "single"), ("train", "two"))
        for i, scene in enumerate(evaluation_scenes(SAMPLES, split, kind))
    }
    return Perfect(recipe(Produce()), images)


@pytest.fixture(scope="module")
def figures(produce):
    return evaluate(produce, samples=SAMPLES)


def test_rendered_scenes_score_nearly_all_and_by_chance_nothing(figures):
    assert len(figures) == 3
    for attributes in figures.values():
        assert attributes["joint"]["score"] >= 0.8
        assert attributes["joint"]["ceiling"] >= 0.8
        assert attributes["joint"]["chance"] <= 0.2


def test_every_attribute_has_a_line_of_three_figures(figures):
    rows = [row for attributes in figures.values() for row in attributes.values()]
    assert all(tuple(row) == COLUMNS for row in rows)
    lines = table(figures).splitlines()
    assert len(lines) == len(figures) + len(rows)
    for line in (line for line in lines if line.startswith("  ")):
        assert line.count("%") == 3
    assert lines[-1].split()[0] == "joint"


def test_of_latents_the_way_through_the_autoencoder_is_scored_too(recipe, produce, figures):
    class Latent(Perfect):
        def autoencode(self, images):
            return np.full_like(images, 128)

    pipeline = Latent(recipe(Produce()), produce.images)
    pipeline.task = SimpleNamespace(latents=object())
    others = evaluate(pipeline, samples=SAMPLES)
    for name, attributes in others.items():
        assert attributes["joint"] == figures[name]["joint"] | {"latents": 0.0}
    assert table(others).splitlines()[0].endswith("latents")


def test_true_emoji_score_all_in_all_three_columns(recipe, tmp_path, monkeypatch):
    def noise(path, size: int) -> None:  # in the place of the drawings, which take long to render
        shape = (len(openmoji._svg_files()), size, size, 3)
        np.save(path, np.random.default_rng(0).integers(0, 256, shape, np.uint8))

    monkeypatch.setattr(openmoji, "_render_all", noise)
    source = OpenMoji(size=32, cache=str(tmp_path))
    drawings = dataclasses.replace(source, split="all")
    places = {drawing.name: i for i, drawing in enumerate(drawings.emojis)}
    images = {p.text: drawings.image(places[p.target]) for p in held_out_prompts(SAMPLES)}
    (attributes,) = evaluate(Perfect(recipe(source, 32), images), samples=SAMPLES).values()
    assert list(attributes) == ["gender", "tone", "joint"]
    for row in attributes.values():
        assert tuple(row) == COLUMNS
        assert row["score"] == 1
    assert attributes["joint"]["ceiling"] == 1
    assert attributes["joint"]["chance"] <= 0.3


@pytest.mark.parametrize(
    ("source", "size", "message"),
    [
        (ImageFolder(path="photos"), 64, "trained on ImageFolder: expected Produce or OpenMoji"),
        (Produce(size=32), 32, "images of 32 pixels: expected data.transforms.size to be 64"),
        (OpenMoji(size=48), 64, "images of 64 pixels: expected data.transforms.size to be 48"),
    ],
)
def test_what_no_rule_judges_is_refused(source, size, message, recipe):
    config = recipe(source, size)
    with pytest.raises(UserError, match=f"{message}.*eval_samples 0"):
        check_scorable(config)
    with pytest.raises(UserError, match=message):
        evaluate(Perfect(config, {}), samples=SAMPLES)


def test_what_rules_judge_is_not_refused(recipe):
    check_scorable(recipe(Produce()))
    check_scorable(recipe(OpenMoji(size=32), 32))


@pytest.fixture
def loads_produce(monkeypatch, produce):
    """Whatever folder is asked for holds the perfect model."""
    monkeypatch.setattr(module, "read_bundle", lambda folder: folder)
    monkeypatch.setattr(module, "Pipeline", lambda _: produce)


@pytest.mark.usefixtures("loads_produce")
def test_a_folder_keeps_its_figures_and_prints_them(tmp_path, capsys):
    evaluate_folder(str(tmp_path), samples=2, batch_size=None)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["samples"] == 2
    assert table(saved["figures"]) in capsys.readouterr().out


@pytest.mark.usefixtures("loads_produce")
def test_the_best_of_several_is_scored_and_told(tmp_path, monkeypatch, capsys, produce):
    asked = {}

    def best(self, prompts, **arguments):
        asked.update(arguments)
        return Best(self(prompts), np.zeros(len(prompts)), np.zeros((len(prompts), 3)))

    monkeypatch.setattr(Perfect, "best", best)
    settings = {"best_of": 3, "clip_model": "mine", "guidance_scale": 1.5}
    evaluate_folder(str(tmp_path), samples=2, **settings)
    assert asked == {"of": 3, "clip": "mine", "guidance_scale": 1.5, "batch_size": None}
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved.items() >= settings.items()
    *_, last, _ = capsys.readouterr().out.splitlines()
    assert last == ("2 samples of each kind, guidance scale 1.5, each the best of 3 as mine finds")
    with pytest.raises(UserError, match="--best-of is 0"):
        evaluate_folder(str(tmp_path), samples=2, best_of=0)


@pytest.mark.usefixtures("loads_produce")
def test_what_a_clip_steers_is_scored_and_told(tmp_path, monkeypatch, capsys):
    asked = {}
    draw = Perfect.__call__

    def steered(self, prompts, **arguments):
        asked.update(arguments)
        return draw(self, prompts)

    monkeypatch.setattr(Perfect, "__call__", steered)
    evaluate_folder(str(tmp_path), samples=2, guidance_scale=1.0, clip_scale=3.0, clip_model="mine")
    assert asked["clip"] == ClipGuidance(scale=3.0, model="mine")
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert (saved["clip_scale"], saved["clip_model"]) == (3.0, "mine")
    *_, last, _ = capsys.readouterr().out.splitlines()
    assert last == "2 samples of each kind, guidance scale 1, steered by mine at scale 3"
    with pytest.raises(UserError, match="--clip-model is about --clip-scale and --best-of"):
        evaluate_folder(str(tmp_path), samples=2, clip_model="mine")
    with pytest.raises(UserError, match="--clip-scale and --best-of exclude each other"):
        evaluate_folder(str(tmp_path), samples=2, best_of=2, clip_scale=1.0)


@pytest.mark.usefixtures("loads_produce")
def test_the_figures_of_a_shipped_model_are_only_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluate_folder("shipped:produce", samples=2, batch_size=None)
    assert "joint" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_fewer_than_two_samples_are_refused():
    with pytest.raises(UserError, match="--samples is 1"):
        evaluate_folder("runs/any", samples=1, batch_size=None)
