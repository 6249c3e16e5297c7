"""Sweeps: values, saved figures, the table and the plot of quality over cost."""

import dataclasses
import json
import math

import numpy as np
import pytest
from etils import epath
from PIL import Image

from jaxdiff.cli import evaluate_sweep
from jaxdiff.cli import main as cli
from jaxdiff.cli.evaluate_sweep import parse_sweep
from jaxdiff.cli.sweep import SavedFigures, parse_values
from jaxdiff.cli.sweep_plot import FRONT, SweepPoint, pareto_front, render_sweep
from jaxdiff.config.serialization import to_json
from jaxdiff.errors import UserError
from jaxdiff.evaluation import clip_score
from jaxdiff.evaluation.clip_score import ClipScore
from jaxdiff.evaluation.evaluator import Report
from jaxdiff.evaluation.feature_distance import FeatureDistance
from jaxdiff.evaluation.held_out import HeldOutLoss
from jaxdiff.evaluation.selection import Selection
from jaxdiff.io.images import save_png
from jaxdiff.pretrained.bundle import RECIPE, write_bundle, write_json
from jaxdiff.sampling.solvers_ode import Heun

POINTS = [SweepPoint("a", 1, 0.5), SweepPoint("b", 2, 0.4), SweepPoint("c", 2, 0.7)]


def test_values_are_ranges_and_lists():
    assert parse_values("1:2:0.25", "--x") == (1, 1.25, 1.5, 1.75, 2)
    assert parse_values("0.1:0.3:0.1", "--x") == (0.1, 0.2, 0.3)
    assert parse_values("8,12,heun", "--x") == (8, 12, "heun")
    for text in ("", "1,", "1:2", "1:2:0", "2:1:1", "0:1e9:1", "a:b:c"):
        with pytest.raises(UserError, match="--x is"):
            parse_values(text, "--x")


def test_a_sweep_is_all_combinations():
    points = parse_sweep(["guidance-scale=1:2:1", "num_steps=8,12", "solver=heun"])
    assert points[1] == {"guidance_scale": 1, "num_steps": 12, "solver": "heun"}
    assert len(points) == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seeds=1,2"], "expected NAME=VALUES with each of guidance_scale, num_steps, solver"),
        (["num_steps"], "expected NAME=VALUES"),
        (["num_steps=8", "num_steps=9"], "at most once"),
        (["num_steps=0,4"], "num_steps is 0"),
        (["num_steps=many"], "expected numbers"),
        (["solver=magic"], "solver is magic: expected one of ddim"),
    ],
)
def test_other_sweeps_are_refused(words, says):
    with pytest.raises(UserError, match=says):
        parse_sweep(words)


def test_figures_are_measured_once_for_the_same_settings(tmp_path):
    path = epath.Path(tmp_path) / "figures.json"
    two, three = (Report(scalars={"y": y}, provenance={"y": {"images": 4}}) for y in (2.0, 3.0))
    assert SavedFigures(path, {"n": 1}).measure({"x": 1}, lambda: two) == {"y": 2.0}
    assert SavedFigures(path, {"n": 1}).measure({"x": 1}, pytest.fail) == {"y": 2.0}
    [point] = json.loads(path.read_text())["points"]
    assert point["provenance"]["figures"] == {"y": {"images": 4}}
    assert SavedFigures(path, {"n": 2}).measure({"x": 1}, lambda: three) == {"y": 3.0}


def test_a_figure_that_is_no_number_is_saved_and_read(tmp_path):
    path = epath.Path(tmp_path) / "figures.json"
    SavedFigures(path, {}).measure({"x": 1}, lambda: Report(scalars={"y": math.nan}))
    assert math.isnan(SavedFigures(path, {}).measure({"x": 1}, pytest.fail)["y"])


def test_the_front_has_the_best_quality_at_each_cost():
    assert pareto_front(POINTS, "max") == [0, 2]
    assert pareto_front(POINTS, "min") == [0, 1]
    equal = [SweepPoint("a", 1, 0.5), SweepPoint("b", 2, 0.5), SweepPoint("c", 1, float("nan"))]
    assert pareto_front(equal, "max") == [0]


def test_the_plot_marks_the_front():
    names = {"title": "t", "cost": "TFLOP/image", "quality": "score"}
    image = render_sweep(POINTS, "max", **names)
    assert (image == FRONT).all(-1).sum() > 500
    lower = render_sweep(POINTS, "min", **names)
    assert not np.array_equal(image, lower)
    assert render_sweep(POINTS[:1], "max", **names).shape == image.shape


@pytest.fixture
def model(tiny_bundle, tiny_recipe, tmp_path):
    folder = tmp_path / "model"
    write_bundle(folder, tiny_bundle, dtype="float32")
    config = tiny_recipe()
    data = dataclasses.replace(config.data, held_out=0.1)
    config = dataclasses.replace(config, data=data, evaluators=(HeldOutLoss(), ClipScore()))
    write_json(epath.Path(folder) / RECIPE, to_json(config))
    return folder


def test_a_sweep_writes_figures_table_and_plot_and_resumes(model, monkeypatch, capsys):
    calls = []

    def run(evaluators, context, images, log):
        assert [evaluator.name for evaluator in evaluators] == ["clip_score"]
        calls.append(context.generation.arguments)
        scale = context.generation.arguments["guidance_scale"]
        return Report(scalars={"clip_score/score": 20.0 + scale, "clip_score/data": 30.0})

    monkeypatch.setattr(evaluate_sweep, "run_evaluators", run)
    words = ["evaluate", str(model), "--sweep", "guidance_scale=1:2:0.5", "solver=ddim,heun"]
    assert cli.main(words) == 0
    assert len(calls) == 6
    assert calls[1]["sampler"].solver == Heun()
    said = capsys.readouterr().out
    assert "GFLOP/image" in said
    assert "22" in said
    found = json.loads((model / "evaluation_sweep.json").read_text())
    assert found["points"][5]["point"] == {"guidance_scale": 2, "solver": "heun"}
    assert found["points"][5]["figures"]["clip_score/score"] == 22.0
    assert Image.open(model / "evaluation_sweep.png").size == (960, 640)
    assert not (model / "evaluation.json").exists()
    assert cli.main([*words[:-1], "solver=ddim,heun,euler"]) == 0
    assert len(calls) == 9
    assert cli.main([*words, "--scalar", "clip_score/data"]) == 0  # shows another figure
    assert len(calls) == 9
    assert cli.main([*words, "--samples", "20", "--scalar", "clip_score/data"]) == 0
    assert len(calls) == 15
    other = clip_score.clip_score_network("shipped:produce_clip")
    other = other._replace(provenance={**other.provenance, "weights": "others"})
    monkeypatch.setattr(clip_score, "clip_score_network", lambda _: other)
    assert cli.main(words) == 0  # another CLIP in the same place
    assert len(calls) == 21


def test_another_reference_in_the_same_place_is_another_fingerprint(tiny_recipe, tmp_path):
    data = tiny_recipe().data
    evaluator = FeatureDistance(reference=str(tmp_path))
    image = np.zeros((8, 8, 3), np.uint8)
    save_png(tmp_path / "0.png", image)
    first = evaluator.fingerprints(data)
    assert evaluator.fingerprints(data) == first
    save_png(tmp_path / "1.png", image)
    assert evaluator.fingerprints(data)["reference"] != first["reference"]
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    files = FeatureDistance(reference=str(tmp_path / "a.npz"))
    before = files.fingerprints(data)["reference"]
    np.savez(tmp_path / "a.npz", mu=np.ones(3), sigma=np.eye(3))
    assert files.fingerprints(data)["reference"] != before


def test_a_sweep_shows_distances_as_lower_is_better():
    distance = FeatureDistance()
    assert Selection(scalar="features/fid").goal_of(distance) == "min"
    assert Selection(scalar="features/recall").goal_of(distance) == "max"
    assert Selection(scalar="features/recall", goal="min").goal_of(distance) == "min"


def test_mistakes_are_one_sentence(model, capsys):
    for words, says in (
        (["--scalar", "clip_score/score"], "--scalar has no effect alone"),
        (["--sweep", "num_steps=2", "--scalar", "x/y"], "no evaluator of the recipe reports"),
    ):
        assert cli.main(["evaluate", str(model), *words]) == 2
        assert says in capsys.readouterr().err


def test_guidance_costs_a_second_prediction(tiny_bundle):
    alone, guided, more = (
        evaluate_sweep._flops(tiny_bundle.spec, {"guidance_scale": scale}, 1)
        for scale in (1.0, 2.0, 4.0)
    )
    assert alone < guided == more
