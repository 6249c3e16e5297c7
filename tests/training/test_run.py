"""Outputs of a run beside its checkpoints: a summary, evaluation figures, and images."""

import dataclasses
import errno
import json
import math
import os
import sys
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import EvalContext, Evaluator, Report
from jaxdiff.evaluation.produce import ProduceAccuracy
from jaxdiff.io import terminal
from jaxdiff.training import run as module
from jaxdiff.training.loop import Result
from jaxdiff.training.run import run_recipe
from jaxdiff.training.state import TrainState, no_skips

CALLS: list[EvalContext] = []
FIGURES = {"counting/images": 4.0, "counting/mean": 0.5}


@dataclass(frozen=True, kw_only=True)
class Counting(Evaluator):
    """Records its contexts and reports fixed figures; fails if `fails` is not empty."""

    name: ClassVar[str] = "counting"
    every: int = 0
    label: str | None = None
    fails: list = field(default_factory=list, hash=False)

    def check(self, spec, data):
        if isinstance(data.source, ImageFolder):
            raise UserError("evaluator 'counting' cannot read ImageFolder: leave it out.")

    def evaluate(self, context):
        if self.fails:
            raise MemoryError
        CALLS.append(context)
        images = {name: np.zeros((8, 4, 3), np.uint8) for name in ("samples", "strip")}
        return Report(scalars={"images": 4.0, "mean": 0.5}, images=images, text="counting: 4")


def quiet(_: str) -> None:
    pass


def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def recipe(tiny_recipe):
    """The tiny recipe with an evaluator that runs at its end."""
    CALLS.clear()
    return dataclasses.replace(tiny_recipe(), evaluators=(Counting(),))


@pytest.fixture
def trained(monkeypatch, tiny_bundle):
    """In the place of `train` one that ends at once; a list of the runs, to be changed by tests.

    As in a run that is repeated, only the first has speeds.
    """
    runs = []
    run = {"params": tiny_bundle.params, "fingerprint": "one", "finished": True, "runs": runs}

    def train(config, out, *, fresh, evaluate, finish, log) -> Result:
        runs.append(str(out))
        params, zero = run["params"], jnp.zeros((), jnp.int32)
        state = TrainState(
            step=zero + 6,
            key=jax.random.key(0),
            params=jax.tree.map(jnp.zeros_like, params),
            ema=params,
            opt_state=(),
            task_state=(),
            nonfinite=no_skips(),
        )
        speeds = {"images_per_s": 40.0} if len(runs) == 1 else {}
        summary = {"step": 6, "fingerprint": run["fingerprint"], **speeds}
        result = Result(summary, state, {}, tiny_bundle.tokenizers, run["finished"])
        if result.finished:
            finish(result)
        return result

    monkeypatch.setattr(module, "train", train)
    return run


def test_the_summary_has_the_end_of_the_run_and_its_evaluation(trained, recipe, tmp_path):
    logged = []
    result = run_recipe(recipe, str(tmp_path), log=logged.append)
    expected = {"step": 6, "fingerprint": "one", "images_per_s": 40.0, "evaluation": FIGURES}
    assert summary(tmp_path) == result.summary
    about = result.summary.pop("provenance")
    assert result.summary == expected
    assert about["figures"].keys() == FIGURES.keys()
    assert about["figures"]["counting/mean"]["evaluator"]["type"] == "Counting"
    assert {"jax", "numpy"} <= set(about["versions"])
    assert "counting: 4" in logged
    assert logged[-1] == f"Finished at step 6: {tmp_path}"


def test_evaluators_get_the_average_of_the_parameters(trained, recipe, tmp_path, tiny_bundle):
    run_recipe(recipe, str(tmp_path), log=quiet)
    (context,) = CALLS
    assert context.step == 6
    assert context.spec == recipe.task.model
    assert context.tokenizers == tiny_bundle.tokenizers
    assert context.data == recipe.data
    jax.tree.map(np.testing.assert_array_equal, context.params, trained["params"])


def test_images_of_a_labelled_evaluator_have_files_of_their_own(trained, recipe, tmp_path):
    both = dataclasses.replace(recipe, evaluators=(Counting(), Counting(label="more")))
    run_recipe(both, str(tmp_path), log=quiet)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    ends = ("", "_more", "_more_strip", "_strip")
    assert names == [f"step_000006{end}.png" for end in ends]


def test_images_are_saved_under_their_step(trained, recipe, tmp_path):
    logged = []
    run_recipe(recipe, str(tmp_path), log=logged.append)
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "samples").iterdir()}
    assert sizes == {"step_000006.png": (4, 8), "step_000006_strip.png": (4, 8)}
    assert f"Samples: {tmp_path / 'samples' / 'step_000006.png'}" in logged


def test_a_stopped_run_has_no_summary(trained, recipe, tmp_path):
    trained["finished"] = False
    logged = []
    assert not run_recipe(recipe, str(tmp_path), log=logged.append).finished
    assert logged[-1].startswith("Stopped at step 6")
    assert list(tmp_path.iterdir()) == CALLS == []


@pytest.mark.parametrize("how", ["none in the recipe", "turned off"])
def test_without_evaluators_nothing_is_evaluated(trained, recipe, tmp_path, how):
    if how == "turned off":
        config = dataclasses.replace(
            recipe, train=dataclasses.replace(recipe.train, evaluate=False)
        )
    else:
        config = dataclasses.replace(recipe, evaluators=())
    run_recipe(config, str(tmp_path), log=quiet)
    assert "evaluation" not in summary(tmp_path)
    assert CALLS == []


def test_an_evaluator_that_fails_leaves_the_summary_and_runs_again(trained, recipe, tmp_path):
    failing = dataclasses.replace(recipe, evaluators=(Counting(fails=[True]),))
    with pytest.raises(MemoryError):
        run_recipe(failing, str(tmp_path), log=quiet)
    before = summary(tmp_path)
    assert before == {"step": 6, "fingerprint": "one", "images_per_s": 40.0}
    run_recipe(recipe, str(tmp_path), log=quiet)
    after = summary(tmp_path)
    assert after.pop("provenance")["figures"].keys() == FIGURES.keys()
    assert after == before | {"evaluation": FIGURES}


def test_a_finished_run_is_not_evaluated_again(trained, recipe, tmp_path):
    run_recipe(recipe, str(tmp_path), log=quiet)
    before = (tmp_path / "summary.json").read_bytes()
    logged = []
    run_recipe(recipe, str(tmp_path), log=logged.append)
    assert len(CALLS) == 1
    assert (tmp_path / "summary.json").read_bytes() == before
    assert sum("is evaluated already" in line for line in logged) == 1


def test_a_longer_run_is_evaluated_again(trained, recipe, tmp_path):
    run_recipe(recipe, str(tmp_path), log=quiet)
    trained["fingerprint"] = "another"
    run_recipe(recipe, str(tmp_path), log=quiet)
    assert len(CALLS) == 2
    assert summary(tmp_path)["fingerprint"] == "another"


def test_evaluators_refuse_unsupported_models_before_training(trained, recipe, tmp_path):
    photos = dataclasses.replace(recipe.data, source=ImageFolder(path="photos"))
    for changes, message in (
        ({"data": photos}, "cannot read ImageFolder"),
        ({"evaluators": (ProduceAccuracy(),)}, "cannot score images of 32 pixels: expected 64"),
    ):
        with pytest.raises(UserError, match=message):
            run_recipe(dataclasses.replace(recipe, **changes), str(tmp_path), log=quiet)
    assert trained["runs"] == []
    config = dataclasses.replace(recipe, data=photos, evaluators=())
    run_recipe(config, str(tmp_path), log=quiet)
    assert len(trained["runs"]) == 1


def test_a_full_disk_is_a_user_error(trained, recipe, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_whole", fail)
    with pytest.raises(UserError, match=r"cannot be written to \(No space left on device\)"):
        run_recipe(recipe, str(tmp_path), log=quiet)


def test_an_evaluator_of_ones_own_runs_at_its_intervals_and_at_the_end(tmp_path, tiny_recipe):
    """In a real run; its scalars are in the run's metrics."""
    CALLS.clear()
    config = dataclasses.replace(tiny_recipe(steps=5), evaluators=(Counting(every=2),))
    result = run_recipe(config, str(tmp_path), log=quiet)
    assert [context.step for context in CALLS] == [2, 4, 5]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    figures = {r["step"]: r["counting/mean"] for r in records if "counting/mean" in r}
    assert figures == {2: 0.5, 4: 0.5, 5: 0.5}
    assert result.summary["evaluation"] == FIGURES
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names[::2] == ["step_000002.png", "step_000004.png", "step_000005.png"]
    # The parameters that each saw are those of its step.
    leaves = [jax.tree.leaves(context.params)[0] for context in CALLS]
    assert not np.array_equal(leaves[0], leaves[1])


def test_an_evaluator_that_fails_in_training_is_reported_and_the_others_run(
    tmp_path, tiny_recipe, monkeypatch
):
    def evaluate(self, context):
        if self.label == "failing" and context.step < 3:
            raise UserError("There are too few records: lower data.held_out.")
        return Report(scalars={"mean": 0.5})

    monkeypatch.setattr(Counting, "evaluate", evaluate)
    evaluators = (Counting(every=1, label="failing"), Counting(every=1))
    config = dataclasses.replace(tiny_recipe(steps=3), evaluators=evaluators)
    logged = []
    assert run_recipe(config, str(tmp_path), log=logged.append).finished
    end = ": There are too few records: lower data.held_out."
    assert [x for x in logged if x.endswith(end)] == [
        f"No figures of 'failing' at step {step}{end}" for step in (1, 2)
    ]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "counting/mean" in r] == [1, 2, 3]
    assert [r["step"] for r in records if "failing/mean" in r] == [3]


def test_a_run_that_is_extended_has_no_summary_until_it_ends(tmp_path, tiny_recipe, monkeypatch):
    config = dataclasses.replace(tiny_recipe(steps=2), evaluators=(Counting(every=1),))
    run_recipe(config, str(tmp_path), log=quiet)
    there = {}

    def evaluate(_, context):
        there[context.step] = (tmp_path / "summary.json").exists()
        return Report()

    monkeypatch.setattr(Counting, "evaluate", evaluate)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
    run_recipe(longer, str(tmp_path), log=quiet)
    assert there == {3: False, 4: True}  # written before the evaluation at the end
    assert summary(tmp_path)["step"] == 4


@pytest.mark.parametrize("name", ["closed", "full", "none"])
def test_output_that_cannot_be_written_does_not_end_a_run(
    recipe, tmp_path, monkeypatch, capsys, name
):
    stream = None
    if name == "full":
        stream = open("/dev/full", "w")  # noqa: SIM115
    if name == "closed":
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    config = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=2))
    assert run_recipe(config, str(tmp_path / "run")).finished  # with its own `log`
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    assert summary(tmp_path / "run")["evaluation"] == FIGURES
    if stream is not None:
        terminal._discard(stream)
        stream.close()


def test_figures_that_are_not_finite_are_null(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Counting, "evaluate", lambda *_: Report(scalars={"mean": math.nan}))
    config = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=1))
    for _ in range(2):  # the second reads the summary of the first
        run_recipe(config, str(tmp_path), log=quiet)
        assert summary(tmp_path)["evaluation"] == {"counting/mean": None}
