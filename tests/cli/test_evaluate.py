"""`jaxdiff evaluate`."""

import dataclasses
import datetime
import json
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
import pytest
from etils import epath

from jaxdiff.cli import evaluate as module
from jaxdiff.cli import main as cli
from jaxdiff.config.serialization import accept_types, to_json
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.errors import UserError
from jaxdiff.evaluation import self_test
from jaxdiff.evaluation.clip_score import ClipScore
from jaxdiff.evaluation.evaluator import Evaluator, Report
from jaxdiff.evaluation.feature_distance import FeatureDistance
from jaxdiff.evaluation.features import FeatureNetwork, clip_score_network
from jaxdiff.evaluation.produce import ProduceAccuracy
from jaxdiff.evaluation.samples import SampleGrid
from jaxdiff.io.images import save_png
from jaxdiff.io.lock import lock_folder
from jaxdiff.pretrained.bundle import RECIPE, exported_fingerprint, write_bundle, write_json
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance

GRID = SampleGrid(prompts=("a pea",))


@pytest.fixture
def model(tiny_bundle, tiny_recipe, tmp_path):
    """`model(ClipScore())`: the folder of the tiny model, trained by a recipe with evaluators."""

    def make(*evaluators, **changes):
        config = tiny_recipe()
        data = dataclasses.replace(config.data, **changes)
        config = dataclasses.replace(config, data=data, evaluators=evaluators)
        folder = tmp_path / "model"
        write_bundle(folder, tiny_bundle, dtype="float32")
        write_json(epath.Path(folder) / RECIPE, to_json(config))
        return folder

    return make


@pytest.fixture
def calls(monkeypatch):
    """What the command evaluates; a list of (evaluators, context)."""
    found = []

    def run(evaluators, context, images, log):
        assert images is None
        found.append((evaluators, context))
        log("the table")
        name = "clip_score/score"
        return Report(scalars={name: 20.0}, provenance={name: {"images": 8}})

    monkeypatch.setattr(module, "run_evaluators", run)
    return found


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


def saved(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_figures_are_printed_and_saved_in_the_folder_of_the_model(model, calls, capsys):
    folder = model(GRID, ClipScore(samples=9))
    assert cli.main(["evaluate", str(folder)]) == 0
    [(evaluators, context)] = calls
    assert evaluators == (ClipScore(samples=9),)
    assert (context.generation.best_of, context.generation.arguments["batch_size"]) == (1, None)
    about = saved(folder).pop("provenance")
    assert saved(folder) == {
        "images": "8 of clip_score",
        "guidance_scale": context.spec.sampler.resolve().guidance_scale,
        "best_of": 1,
        "figures": {"clip_score/score": 20.0},
        "provenance": about,
    }
    assert about["figures"] == {"clip_score/score": {"images": 8}}
    assert about["sampler"] == to_json(context.spec.sampler)
    assert about["seeds"] == "0 to 7"
    assert about["weights"] == exported_fingerprint(load_bundle(folder).params)
    assert datetime.date.fromisoformat(about["date"])
    assert {"jax", "numpy"} <= set(about["versions"])
    table, settings, where = capsys.readouterr().out.splitlines()
    assert (table, where) == ("the table", f"Saved {folder / 'evaluation.json'}")
    assert settings.startswith("images 8 of clip_score; guidance_scale ")


@pytest.mark.parametrize(
    ("words", "arguments", "settings"),
    [
        (("--guidance-scale", "1.5"), {"guidance_scale": 1.5}, {"guidance_scale": 1.5}),
        (("--batch-size", "3", "--samples", "2"), {"batch_size": 3}, {}),
        (
            ("--clip-scale", "3", "--clip-model", "mine"),
            {"clip": ClipGuidance(scale=3.0, model="mine")},
            {"clip_scale": 3.0, "clip_model": "mine", "clip_weights": "of mine"},
        ),
        (
            ("--best-of", "3"),
            {"best_of": 3, "clip_model": ClipGuidance.model},
            {"best_of": 3, "clip_scale": 0.0, "clip_weights": f"of {ClipGuidance.model}"},
        ),
    ],
)
def test_options_say_how_images_are_generated(
    model, calls, words, arguments, settings, monkeypatch
):
    network = clip_score_network(ClipGuidance.model)
    monkeypatch.setattr(
        module,
        "clip_score_network",
        lambda name: network._replace(provenance={"weights": f"of {name}"}),
    )
    folder = model(ClipScore())
    assert cli.main(["evaluate", str(folder), *words]) == 0
    [(_, context)] = calls
    how = context.generation
    given = {**how.arguments, "best_of": how.best_of, "clip_model": how.clip_model}
    if "guidance" in given:
        given["clip"] = given["guidance"].clip
    assert given.items() >= arguments.items()
    assert saved(folder).items() >= settings.items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--samples", "1"), "--samples is 1"),
        (("--best-of", "0"), "--best-of is 0"),
        (("--best-of", "2", "--clip-scale", "1"), "--clip-scale and --best-of exclude each other"),
        (("--clip-model", "mine"), "--clip-model has no effect alone"),
        (("--clip-model", ClipGuidance.model), "--clip-model has no effect alone"),
    ],
)
def test_options_that_do_not_fit_are_refused(refused, calls, words, message):
    assert message in refused("evaluate", "runs/any", *words)
    assert calls == []


def test_a_folder_without_a_model_is_refused(refused, tmp_path):
    assert "nowhere holds no recipe" in refused("evaluate", str(tmp_path / "nowhere"))


def test_a_recipe_without_figures_asks_for_another_one(model, calls, refused):
    message = refused("evaluate", str(model(GRID, source=ImageFolder(path="photos"))))
    assert "tiny has no evaluators with figures: name a recipe" in message
    assert calls == []


def test_evaluators_of_one_name_are_refused(model, refused, calls):
    message = refused("evaluate", str(model(ClipScore(), ClipScore(samples=9))))
    assert "evaluators has 2 of the name 'clip_score'" in message
    assert calls == []


def test_an_evaluator_that_does_not_fit_the_model_is_refused(model, refused):
    message = refused("evaluate", str(model(ProduceAccuracy())))
    assert "cannot score images of 32 pixels: expected 64" in message


def test_the_evaluators_and_the_data_of_another_recipe_are_used(model, calls, tmp_path):
    recipe = tmp_path / "other.py"
    recipe.write_text(
        "import json, pathlib\n"
        "from jaxdiff.training.recipe import config_from_json\n"
        "def get_config():\n"
        "    text = pathlib.Path(__file__).with_suffix('.json').read_text()\n"
        "    return config_from_json(json.loads(text))\n"
    )
    source = ImageFolder(path="photos")
    folder = model(ClipScore(samples=9), source=source)
    (folder / RECIPE).rename(recipe.with_suffix(".json"))
    assert cli.main(["evaluate", str(folder), "--recipe", str(recipe)]) == 0
    [(evaluators, context)] = calls
    assert evaluators == (ClipScore(samples=9),)
    assert context.data.source == source


def test_the_figures_of_a_shipped_model_are_only_printed(calls, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "shipped:produce", "--samples", "2"]) == 0
    assert "the table" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["owner/name", "runs/typo"])
def test_no_folder_is_made_for_a_model_that_is_not_here(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_bundle", lambda _: pytest.fail("it was loaded"))
    assert f"{name} is no folder here" in refused(
        "evaluate", name, "--recipe", "produce", "--sweep", "num_steps=1,2"
    )

    def absent(_):
        raise UserError("There is no such model: name another.")

    monkeypatch.setattr(module, "load_bundle", absent)
    assert "no such model" in refused("evaluate", name, "--recipe", "produce")
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_any_data_with_captions_has_a_score(one_device, model, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        save_png(photos / f"{i}.png", np.full((40, 32, 3), 50 * i, np.uint8))
        (photos / f"{i}.txt").write_text(f"a pea {i}")

    folder = model(ClipScore(), source=ImageFolder(path=str(photos)))
    assert cli.main(["evaluate", str(folder), "--samples", "9"]) == 0
    assert "3 images (too few usable records for 9 samples)" in capsys.readouterr().out
    assert saved(folder)["images"] == "3 of clip_score"
    figures = saved(folder)["figures"]
    assert all(-100 < figures[f"clip_score/{name}"] < 100 for name in ("score", "data", "chance"))
    assert 0 <= figures["clip_score/retrieval"] <= 1


@dataclass(frozen=True, kw_only=True)
class NumParams(Evaluator):
    """Reports the number of parameters, and has no samples."""

    name: ClassVar[str] = "size"

    def evaluate(self, context):
        return Report(scalars={"params": float(sum(map(np.size, jax.tree.leaves(context.params))))})


def test_an_evaluator_of_ones_own_needs_no_samples(model):
    folder = model(NumParams())
    with accept_types([NumParams]):
        assert cli.main(["evaluate", str(folder)]) == 0
    assert saved(folder)["figures"]["size/params"] > 0


def test_figures_that_cannot_be_saved_are_printed(model, calls, monkeypatch, capsys):
    folder = model(ClipScore())

    def refuse(*_):
        raise UserError("it cannot be written.")

    monkeypatch.setattr(module, "write_whole", refuse)
    monkeypatch.setattr(module, "make_folder", refuse)
    assert cli.main(["evaluate", str(folder)]) == 0
    said = capsys.readouterr()
    assert "the table" in said.out
    assert "Saved" not in said.out
    assert said.err == ("jaxdiff: The figures are printed but not saved: it cannot be written.\n")


def test_a_run_in_training_is_evaluated_into_another_folder(
    model, calls, tmp_path, capsys, refused
):
    folder = model(ClipScore())
    with lock_folder(folder):
        assert "is in use by process" in refused("evaluate", str(folder))
        assert cli.main(["evaluate", str(folder), "--out", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "evaluation.json").exists()
    assert not (folder / "evaluation.json").exists()


def squares(folder, count, seed=0):
    """Write images of random colours."""
    for i, colour in enumerate(np.random.default_rng(seed).integers(0, 256, (count, 3), np.uint8)):
        image = np.full((40, 40, 3), colour, np.uint8)
        image[10:20, 8 : 12 + i % 20] = 255 - colour
        save_png(folder / f"{i:03d}.png", image)
    return str(folder)


def test_images_of_any_generator_are_scored_against_a_reference_and_compared(
    one_device, tmp_path, capsys, refused
):
    real, first = squares(tmp_path / "real", 12), squares(tmp_path / "first", 12, seed=1)
    second, fewer = squares(tmp_path / "second", 12, seed=2), squares(tmp_path / "few", 8, seed=1)
    reference, words = str(tmp_path / "real.safetensors"), ("--few", "--out")
    assert cli.main(["evaluate", "--reference", real, "--out", reference]) == 0
    assert f"Saved {reference}: statistics of 12 images of {real}" in capsys.readouterr().out
    for images in (first, second, fewer):
        command = [
            "evaluate",
            "--images",
            images,
            "--reference",
            reference,
            *words,
            f"{images}-out",
        ]
        assert cli.main(command) == 0
    assert "frechet_shipped_produce_clip" in capsys.readouterr().out
    files = [f"{images}-out/evaluation.json" for images in (first, second, fewer)]
    figures = [json.loads(epath.Path(file).read_text())["figures"] for file in files]
    assert figures[0].keys() == figures[1].keys()
    assert figures[0] != figures[1]
    assert not list(tmp_path.glob("*-out/evaluation_parts"))
    assert cli.main(["evaluate", "compare", *files[:2]]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(figures[0])
    assert table[1].startswith("frechet_shipped_produce_clip ")
    message = refused("evaluate", "compare", files[0], files[2])
    assert "not comparable (images is 12 in the first and 8 in the second)" in message


def test_too_few_images_are_refused_before_their_features_are_computed(
    one_device, tmp_path, monkeypatch, refused
):
    made = squares(tmp_path / "made", 3)
    monkeypatch.setattr(FeatureNetwork, "__call__", lambda *_: pytest.fail("an image was read"))
    words = ("--images", made, "--reference", made, "--measures", "frechet")
    assert "of 3 images says little" in refused("evaluate", *words)


def test_a_recipe_is_a_reference(one_device, recipe, tmp_path, capsys):
    made = squares(tmp_path / "made", 8)
    words = ("--images", made, "--reference", recipe, "--few", "--measures", "mmd")
    assert cli.main(["evaluate", *words]) == 0
    figure, about = capsys.readouterr().out.splitlines()
    assert figure.startswith("mmd_shipped_produce_clip ")
    assert about == f"{made}: 8; reference Produce: 4"


def test_images_in_an_archive_are_scored(one_device, tmp_path, capsys, refused):
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), np.uint8)
    np.savez(tmp_path / "made.npz", arr_0=images)
    np.savez(tmp_path / "moments.npz", mu=np.zeros(128), sigma=np.eye(128))
    made, moments = str(tmp_path / "made.npz"), str(tmp_path / "moments.npz")
    assert cli.main(["evaluate", "--images", made, "--reference", made, "--measures", "mmd"]) == 0
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(0, abs=1e-9)
    assert "holds statistics" in refused("evaluate", "--images", moments, "--reference", made)
    out = ("--out", str(tmp_path / "again.safetensors"))
    assert "holds mean and covariance alone" in refused("evaluate", "--reference", moments, *out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs a model: give its folder, or --images"),
        (("--images", "a"), "--images needs --reference"),
        (
            ("runs/a", "--images", "a", "--reference", "b"),
            "--images and a model exclude each other",
        ),
        (("--reference", "a"), "--reference alone writes statistics and needs --out"),
        (("--reference", "a", "--out", "b"), "ends in .safetensors"),
        (("compare", "a"), "takes two files"),
        (("runs/a", "--self-test"), "--self-test and a model exclude each other"),
        (("--self-test", "--few"), "--few has no effect with --self-test"),
        (("--reference", "a", "--samples", "9"), "--samples has no effect without a model"),
        (("--images", "a", "--sweep", "num_steps=2"), "--sweep has no effect without a model"),
        (("--images", "a", "--best-of", "4"), "--best-of has no effect without a model"),
        (("--images", "a", "--clip-scale", "2"), "--clip-scale has no effect without a model"),
        (("--images", "a", "--reference", "b", "--resize", "pytorch"), "--resize has no effect on"),
        (
            ("--images", "a", "--reference", "none"),
            "--reference none does not exist and is no recipe: expected a folder of images",
        ),
    ],
)
def test_images_without_what_they_need_are_refused(refused, words, message):
    assert message in refused("evaluate", *words)


def test_figures_that_do_not_state_what_they_depend_on_are_refused(refused, tmp_path):
    (tmp_path / "a.json").write_text('{"figures": {"fid": 3.0}}')
    file = str(tmp_path / "a.json")
    assert "does not state what its figures depend on" in refused("evaluate", "compare", file, file)


def test_a_reference_makes_an_evaluator_of_its_features(model, calls, tmp_path):
    folder, real = model(ClipScore()), squares(tmp_path / "real", 3)
    words = ("--reference", real, "--samples", "7", "--measures", "mmd", "kernel")
    assert cli.main(["evaluate", str(folder), *words]) == 0
    [(evaluators, context)] = calls
    expected = FeatureDistance(reference=real, samples=7, measures=("mmd", "kernel"))
    assert evaluators == (expected,)
    assert context.parts == epath.Path(folder) / "evaluation_parts"


def test_features_that_are_the_default_make_an_evaluator_too(model, calls):
    folder = model(ClipScore())
    words = ("--features", "shipped:produce_clip")
    assert cli.main(["evaluate", str(folder), *words, "--measures", "mmd"]) == 0
    [(evaluators, _)] = calls
    assert evaluators == (FeatureDistance(samples=500, measures=("mmd",)),)


def test_the_self_test_compares_with_stored_values(monkeypatch, capsys):
    found = dict(self_test.STORED)
    monkeypatch.setattr(self_test, "_values", lambda: found)
    assert cli.main(["evaluate", "--self-test"]) == 0
    assert capsys.readouterr().out.count("equal") == len(found)
    found["inception, mean"] *= 1.01
    assert cli.main(["evaluate", "--self-test"]) == 2
    end = capsys.readouterr()
    assert end.out.count("differs") == 1
    assert "differ from the stored values: inception, mean; do not compare" in end.err


@pytest.mark.optimized
def test_the_shipped_clip_and_the_small_dinov2_have_the_stored_values(monkeypatch):
    monkeypatch.setattr(self_test, "inception_network", lambda *_: lambda _: np.ones((3, 8)))
    found = self_test._values()
    for name, stored in self_test.STORED.items():
        if not name.startswith("inception"):
            assert found[name] == pytest.approx(stored, rel=1e-4)
