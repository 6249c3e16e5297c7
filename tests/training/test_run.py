"""What a run leaves behind besides its checkpoints: a summary, its scores, and pictures."""

import dataclasses
import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig, Gaussian
from jaxdiff.training import run as session
from jaxdiff.training.loop import Result
from jaxdiff.training.run import run_recipe
from jaxdiff.training.state import TrainState, no_skips
from jaxdiff.training.tasks.autoencoder import AutoencoderTask

FIGURES = {"two objects": {"joint": {"score": 0.5, "ceiling": 1.0, "chance": 0.0}}}
PROMPTS = ("a small red pea", "a green tomato with a stem", "a blue pear")


def quiet(_: str) -> None:
    pass


def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def recipe(tiny_recipe):
    """The tiny recipe at the size that can be scored, and to be scored on four samples."""
    config = tiny_recipe()
    data = dataclasses.replace(config.data, source=Produce(), transforms=Transforms(size=64))
    return dataclasses.replace(config, data=data, eval_samples=4)


@pytest.fixture
def trained(monkeypatch, tiny_bundle):
    """In the place of `train` one that ends at once; a list of the runs, to be changed by tests.

    As in a run that is repeated, only the first has speeds to tell of.
    """
    runs = []
    run = {"params": tiny_bundle.params, "fingerprint": "one", "finished": True, "runs": runs}

    def train(config, out, *, fresh, on_sample, say) -> Result:
        runs.append(str(out))
        params, zero = run["params"], jnp.zeros((), jnp.int32)
        state = TrainState(
            step=zero + 6,
            key=jax.random.key(0),
            params=params,
            ema=params,
            opt_state=(),
            task_state=(),
            nonfinite=no_skips(),
        )
        if on_sample:
            on_sample(state, {}, tiny_bundle.tokenizer)
        speeds = {"images_per_s": 40.0} if len(runs) == 1 else {}
        told = {"step": 6, "fingerprint": run["fingerprint"], **speeds}
        return Result(told, state, {}, tiny_bundle.tokenizer, run["finished"])

    monkeypatch.setattr(session, "train", train)
    return run


@pytest.fixture
def scored(monkeypatch):
    """In the place of `evaluate` one that gives `FIGURES`; returns the numbers of samples."""
    calls = []

    def evaluate(_pipeline, *, samples):
        calls.append(samples)
        return FIGURES

    monkeypatch.setattr(session, "evaluate", evaluate)
    return calls


def test_the_summary_has_the_end_of_the_run_and_its_scores(trained, scored, recipe, tmp_path):
    said = []
    result = run_recipe(recipe, str(tmp_path), say=said.append)
    expected = {"step": 6, "fingerprint": "one", "images_per_s": 40.0, "scores": FIGURES}
    assert summary(tmp_path) == result.summary == expected
    assert scored == [4]
    assert any("two objects" in line for line in said)
    assert said[-1] == f"Finished at step 6: {tmp_path}"


def test_a_run_that_was_stopped_has_no_summary(trained, scored, recipe, tmp_path):
    trained["finished"] = False
    said = []
    assert not run_recipe(recipe, str(tmp_path), say=said.append).finished
    assert said[-1].startswith("Stopped at step 6")
    assert list(tmp_path.iterdir()) == scored == []


def test_without_samples_to_score_on_nothing_is_scored(trained, scored, recipe, tmp_path):
    run_recipe(dataclasses.replace(recipe, eval_samples=0), str(tmp_path), say=quiet)
    assert "scores" not in summary(tmp_path)
    assert scored == []


def test_a_score_that_fails_leaves_the_summary_and_is_made_up_for(
    trained, scored, recipe, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(session, "evaluate", fail)
        with pytest.raises(MemoryError):
            run_recipe(recipe, str(tmp_path), say=quiet)
    before = summary(tmp_path)
    assert before == {"step": 6, "fingerprint": "one", "images_per_s": 40.0}
    run_recipe(recipe, str(tmp_path), say=quiet)
    assert summary(tmp_path) == before | {"scores": FIGURES}


def test_a_finished_run_is_not_scored_again(trained, scored, recipe, tmp_path):
    run_recipe(recipe, str(tmp_path), say=quiet)
    before = (tmp_path / "summary.json").read_bytes()
    said = []
    run_recipe(recipe, str(tmp_path), say=said.append)
    assert scored == [4]
    assert (tmp_path / "summary.json").read_bytes() == before
    assert sum("has its scores already" in line for line in said) == 1


def test_a_run_that_went_on_is_scored_again(trained, scored, recipe, tmp_path):
    run_recipe(recipe, str(tmp_path), say=quiet)
    trained["fingerprint"] = "another"
    run_recipe(recipe, str(tmp_path), say=quiet)
    assert scored == [4, 4]
    assert summary(tmp_path)["fingerprint"] == "another"


def test_what_cannot_be_scored_is_refused_before_the_training(trained, recipe, tmp_path):
    photos = dataclasses.replace(recipe.data, source=ImageFolder(path="photos"))
    for changes, message in (
        ({"eval_samples": 1}, "eval_samples is 1: expected at least 2.* eval_samples 0"),
        ({"eval_samples": -1}, "eval_samples is -1"),
        ({"data": photos}, "no score for models trained on ImageFolder.* eval_samples 0"),
    ):
        with pytest.raises(UserError, match=message):
            run_recipe(dataclasses.replace(recipe, **changes), str(tmp_path), say=quiet)
    assert trained["runs"] == []
    run_recipe(dataclasses.replace(recipe, data=photos, eval_samples=0), str(tmp_path), say=quiet)
    assert len(trained["runs"]) == 1


def test_a_disk_that_takes_nothing_more_is_told(trained, scored, recipe, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(session, "write_whole", fail)
    with pytest.raises(UserError, match=r"cannot be written to \(No space left on device\)"):
        run_recipe(recipe, str(tmp_path), say=quiet)


def test_prompts_are_drawn_as_a_grid_and_their_making_as_a_strip(
    trained, recipe, tmp_path, monkeypatch
):
    class Drawn:
        def __init__(self, bundle):
            assert bundle.params is trained["params"]  # the average's

        def __call__(self, prompts, *, num_snapshots):
            assert tuple(prompts) == PROMPTS
            return np.zeros((num_snapshots, len(prompts), 64, 64, 3), np.uint8)

    monkeypatch.setattr(session, "Pipeline", Drawn)
    sampling = dataclasses.replace(recipe.sampling, prompts=PROMPTS)
    config = dataclasses.replace(recipe, sampling=sampling, eval_samples=0)
    run_recipe(config, str(tmp_path), say=quiet)
    sizes = {p.name: Image.open(p).size for p in (tmp_path / "samples").iterdir()}
    assert sizes.keys() == {"step_000006.png", "step_000006_strip.png"}
    assert sizes["step_000006.png"][0] > 2 * 128  # two columns, at twice the size
    width, height = sizes["step_000006_strip.png"]
    assert width > session.STRIP_LENGTH * 64
    assert 3 * 64 < height < 4 * 64


def test_reconstructions_are_of_the_first_records_that_can_be_used(
    trained, recipe, tmp_path, monkeypatch
):
    whole = Produce.__getitem__

    def spoiled(self, index):
        if index == 0:
            raise RecordError("produce/train/0: unreadable")
        record = whole(self, index)
        return record | {"captions": []} if index == 2 else record

    class Negative:
        """In the place of an autoencoder, gives back the negative of an image."""

        def encode(self, images):
            return Gaussian(images, images)

        def decode(self, z):
            return -z

    monkeypatch.setattr(Produce, "__getitem__", spoiled)
    monkeypatch.setattr(session, "merge", lambda *_: Negative())
    task, source = AutoencoderTask(model=AutoencoderConfig()), Produce(size=32)
    data = dataclasses.replace(recipe.data, source=source, transforms=Transforms(size=32))
    run_recipe(dataclasses.replace(recipe, task=task, data=data), str(tmp_path), say=quiet)
    with Image.open(tmp_path / "samples" / "step_000006.png") as picture:
        tiles = np.asarray(picture)[2:, 2:].reshape(4, 66, 8, 66, 3)[:, :64:2, :, :64:2]
    for place, index in ((0, 1), (1, 3), (7, 9)):
        image = whole(source, index)["image"]
        np.testing.assert_array_equal(tiles[0, :, place], image)
        np.testing.assert_array_equal(tiles[2, :, place], 255 - image)
