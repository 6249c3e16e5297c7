"""The best checkpoint and early stopping: what is kept, when training ends, and resumption."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
import pytest
from etils import epath

from jaxdiff.config.serialization import accept_types
from jaxdiff.errors import UserError
from jaxdiff.evaluation.clip_score import ClipScore
from jaxdiff.evaluation.evaluator import Evaluator, Report
from jaxdiff.evaluation.feature_distance import FeatureDistance
from jaxdiff.evaluation.selection import Selection
from jaxdiff.pretrained import checkpoint_folder
from jaxdiff.pretrained.checkpoint_folder import load_params
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.training.best import BestCheckpoint
from jaxdiff.training.run import run_recipe

SCORES = {1: 3.0, 2: 2.0, 3: 5.0, 4: 2.5, 5: float("nan"), 6: 9.0}
SEEN = []


@dataclass(frozen=True, kw_only=True)
class Scripted(Evaluator):
    """Reports `SCORES` of the step."""

    name: ClassVar[str] = "scripted"
    goal: ClassVar = "min"
    every: int = 1
    label: str | None = None
    figure: str = "score"

    def evaluate(self, context):
        SEEN.append(context.step)
        return Report(scalars={self.figure: SCORES[context.step]})


def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(autouse=True)
def _own_types():
    SEEN.clear()
    with accept_types([Scripted]):
        yield


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    """`recipe(patience=3)`: six steps with an evaluation after each."""

    def make(steps=6, **best):
        config = dataclasses.replace(tiny_recipe(steps=steps), evaluators=(Scripted(),))
        return dataclasses.replace(config, best=BestCheckpoint(scalar="scripted/score", **best))

    return make


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A run that ends early: step 2 is best, and the next three are not."""
    folder, said = tmp_path_factory.mktemp("run"), []
    with accept_types([Scripted]):
        result = run_recipe(recipe(patience=3), str(folder), log=said.append)
    return folder, result, said


def test_a_run_without_evaluations_has_no_best_step(recipe, tmp_path):
    config = recipe(steps=1)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, evaluate=False))
    assert run_recipe(config, str(tmp_path), log=lambda _: None).finished
    assert SEEN == []
    assert not (tmp_path / "best").exists()


def test_training_ends_where_patience_does_and_says_why(run):
    folder, result, said = run
    assert result.finished
    assert summary(folder)["step"] == 5
    assert summary(folder)["ended"] == "3 evaluations in a row without a better scripted/score"
    assert summary(folder)["best"] == {"scalar": "scripted/score", "step": 2, "value": 2.0}
    assert "best step 2, scripted/score 2" in said[-1]


def test_the_best_model_is_one_that_loads(run):
    folder, result, _ = run
    best = epath.Path(folder) / "best"
    assert checkpoint_folder.steps(best / "checkpoints") == [2]
    average, step = load_params(best / "checkpoints")
    assert step == 2
    params = load_bundle(str(best)).params
    jax.tree.map(np.testing.assert_array_equal, params["denoiser"], average["denoiser"])
    last = jax.tree.leaves(result.state.ema["denoiser"])[0]
    assert not np.array_equal(jax.tree.leaves(params["denoiser"])[0], last)


def test_a_finished_run_is_left_as_it_is(run, recipe):
    folder, _, _ = run
    before = summary(folder)
    run_recipe(recipe(patience=3), str(folder), log=lambda _: None)
    assert SEEN == []
    assert summary(folder) == before


def test_a_resumed_run_ends_as_one_that_went_on(run, recipe, tmp_path):
    """It resumes at step 4, where patience was two thirds used, without the metrics file."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    shutil.rmtree(folder / "checkpoints" / "5")
    for name in ("summary.json", "metrics.jsonl"):
        (folder / name).unlink()
    run_recipe(recipe(patience=3), str(folder), log=lambda _: None)
    assert SEEN == [5, 5]  # at its interval, and at the end
    for key in ("best", "ended", "step", "fingerprint"):
        assert summary(folder)[key] == summary(run[0])[key]


def test_an_extended_run_ends_as_one_that_went_on(run, recipe, tmp_path):
    """The best step is the last one of the first part, which is evaluated at its end."""
    folder = tmp_path / "run"
    run_recipe(recipe(steps=2, patience=3), str(folder), log=lambda _: None)
    assert summary(folder)["best"]["step"] == 2
    run_recipe(recipe(patience=3), str(folder), log=lambda _: None)
    assert SEEN == [1, 2, 3, 4, 5, 5]
    assert checkpoint_folder.steps(epath.Path(folder) / "best" / "checkpoints") == [2]
    for key in ("best", "ended", "step", "fingerprint"):
        assert summary(folder)[key] == summary(run[0])[key]


def test_the_second_evaluation_of_a_step_does_not_use_up_patience(run, recipe, tmp_path):
    """The run ended early, so that its last step was evaluated at its interval and at the end."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    run_recipe(recipe(patience=4), str(folder), log=lambda _: None)
    assert SEEN == [6]
    assert summary(folder)["step"] == 6


def test_without_patience_a_run_takes_all_steps_and_more_patience_resumes_it(run, recipe, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    run_recipe(recipe(goal="max"), str(folder), log=lambda _: None)
    assert summary(folder)["ended"] == "all steps were taken"
    assert summary(folder)["best"]["step"] == 6


def test_a_value_is_better_in_the_direction_of_its_evaluator_by_the_least_change():
    selection, evaluator = Selection(scalar="scripted/score"), Scripted()
    assert selection.is_better(1.0, None, evaluator)
    assert selection.is_better(1.0, 2.0, evaluator)
    assert not selection.is_better(1.0, 2.0, evaluator, by=1.0)
    assert not selection.is_better(float("nan"), None, evaluator)
    assert not Selection(scalar="scripted/score", goal="max").is_better(1.0, 2.0, evaluator)


def test_the_best_step_is_that_of_the_labelled_evaluator(recipe, tmp_path):
    """Two evaluators of a kind; the first has another interval, and lacks the figure."""
    evaluators = (Scripted(every=1, figure="other"), Scripted(every=2, label="second"))
    best = BestCheckpoint(scalar="second/score")
    config = dataclasses.replace(recipe(steps=4), evaluators=evaluators, best=best)
    run_recipe(config, str(tmp_path), log=lambda _: None)
    assert summary(tmp_path)["best"] == {"scalar": "second/score", "step": 2, "value": 2.0}
    assert summary(tmp_path)["evaluation"] == {"scripted/other": 2.5, "second/score": 2.5}


def test_a_scalar_that_is_not_reported_costs_the_best_model_and_not_the_training(recipe, tmp_path):
    said = []
    config = dataclasses.replace(recipe(steps=2, patience=1), evaluators=(Scripted(figure="mean"),))
    assert run_recipe(config, str(tmp_path), log=said.append).finished
    assert summary(tmp_path)["step"] == 2
    assert "best" not in summary(tmp_path)
    warnings = [line for line in said if line.startswith("best.scalar keeps no model at step 1: ")]
    assert warnings[0].endswith(
        "reports no 'scripted/score': expected one of scripted/mean; name one of them."
    )


def test_a_scalar_that_an_evaluator_is_known_not_to_report_is_refused():
    best = BestCheckpoint(scalar="clip_score/scores")
    with pytest.raises(
        UserError, match=r"no 'clip_score/scores': expected one of clip_score/chanc"
    ):
        best.check((ClipScore(every=1),))
    best = BestCheckpoint(scalar="features/fid")
    with pytest.raises(UserError, match=r"expected one of features/kernel_shipped_produce_clip; "):
        best.check((FeatureDistance(every=1, measures=("kernel",)),))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"evaluators": (Scripted(), Scripted(every=2))},
            "evaluators has 2 of the name 'scripted', .*: expected different names; set `label`",
        ),
        (
            {"best": BestCheckpoint(scalar="fid/fid")},
            "no evaluator of the recipe reports 'fid/fid'",
        ),
        ({"evaluators": (Scripted(every=0),)}, "its evaluator runs at the end alone"),
    ],
)
def test_a_scalar_that_training_does_not_report_is_refused_first(changes, says, recipe, tmp_path):
    config = dataclasses.replace(recipe(), **changes)
    with pytest.raises(UserError, match=says):
        run_recipe(config, str(tmp_path), log=lambda _: None)
    assert not (tmp_path / "checkpoints").exists()
