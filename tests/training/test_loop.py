"""The loop: exact resumption, signals, what it writes, and that it never waits for the device."""

import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from jaxdiff.data.sources.array_record import ArrayRecord, write_array_record
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.diffusion.curriculum import CurriculumState
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Report
from jaxdiff.evaluation.samples import SampleGrid
from jaxdiff.pretrained import checkpoint_folder
from jaxdiff.pretrained.bundle import read_weights
from jaxdiff.pretrained.run_folder import FROZEN
from jaxdiff.training import loop
from jaxdiff.training.loop import train
from jaxdiff.training.tasks.diffusion import Trainable

NO_SKIPS = {"nonfinite": jnp.int32(0), "nonfinite_in_a_row": jnp.int32(0)}
STEPS = 6


def quiet(_: str) -> None:
    pass


def evaluated(config, every: int = 1):
    """The recipe with an evaluator; tests run functions of their own in its place."""
    return dataclasses.replace(config, evaluators=(SampleGrid(prompts=("a pea",), every=every),))


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@dataclasses.dataclass(frozen=True)
class Run:
    folder: pathlib.Path
    result: loop.Result
    compiled: list[str]  # a name for each program that was compiled
    records: list[dict]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_recipe) -> Run:
    """The tiny recipe from its first step to its last."""
    folder = tmp_path_factory.mktemp("straight")
    compiled = []

    def listen(event: str, _seconds: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    result = train(tiny_recipe(steps=STEPS), folder, log=quiet)
    jax.monitoring.unregister_event_duration_listener(listen)
    return Run(folder, result, compiled, records(folder))


def assert_same_end(result: loop.Result, folder, straight: Run) -> None:
    """Also the curriculum and what was logged, which the fingerprint does not cover."""
    assert result.finished
    assert result.summary["fingerprint"] == straight.result.summary["fingerprint"]
    assert same_bits(result.state.task_state, straight.result.state.task_state)
    figures = ("step", "loss", "grad_norm", "learning_rate", "max_t", "loss_by_level")
    found, expected = (
        [[r[f] for f in figures] for r in x] for x in (records(folder), straight.records)
    )
    assert found == expected


def test_a_run_ends_at_its_last_step_and_compiles_its_step_once(straight):
    assert straight.result.finished
    assert straight.result.summary["step"] == STEPS
    assert sum("train_step" in name for name in straight.compiled) == 1


def test_noise_is_raised_from_a_tenth_by_a_curriculum_in_the_state(straight):
    np.testing.assert_allclose(
        [r["max_t"] for r in straight.records], [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    )
    curriculum, _ = straight.result.state.task_state
    assert isinstance(curriculum, CurriculumState)
    assert int(curriculum.level) == 1 + STEPS // 2


def test_every_line_has_the_figures_that_a_run_is_watched_by(straight):
    figures = {"loss", "loss_by_level", "grad_norm", "learning_rate", "images_per_s"}
    for record in straight.records:
        assert figures | {"skipped_records", "skipped_updates"} <= record.keys()
        assert np.isfinite([record["loss"], record["grad_norm"]]).all()
    assert [r["step"] for r in straight.records] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_killed_and_resumed_equals_straight_bit_for_bit(straight, tmp_path, tiny_recipe, launch):
    config = evaluated(tiny_recipe(steps=STEPS))
    killed = launch(tmp_path, config, code="tests/training/killed.py", devices=8)
    assert killed.wait() == [-signal.SIGKILL], killed.said()
    logged = []
    result = train(tiny_recipe(steps=STEPS), killed.out, log=logged.append)
    assert "Resuming at step 4 of 6." in logged
    assert_same_end(result, killed.out, straight)


@pytest.mark.slow
def test_stopped_by_a_signal_and_resumed_equals_straight_bit_for_bit(
    straight, tmp_path, tiny_recipe
):
    def evaluate(state, *_):
        if int(state.step) == 3:
            signal.raise_signal(signal.SIGINT)
        return Report()

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    logged = []
    config = evaluated(tiny_recipe(steps=STEPS))
    result = train(config, tmp_path, evaluate=evaluate, log=logged.append)
    assert (result.finished, result.summary["step"]) == (False, 3)
    assert any("SIGINT: saving" in line for line in logged)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert_same_end(train(config, tmp_path, log=quiet), tmp_path, straight)


@pytest.mark.slow
@pytest.mark.usefixtures("straight")  # whose compiled step it takes
def test_sigterm_ends_the_command_with_status_0_and_its_step_saved(tmp_path, tiny_recipe, launch):
    config = tiny_recipe(steps=100_000, checkpoint_every=50_000)
    training = launch(tmp_path, config, devices=8)
    training.until_step(1)
    training.send(signal.SIGTERM)
    assert training.wait() == [0], training.said()
    (step,) = [path.name for path in (training.out / "checkpoints").iterdir()]
    assert f"Stopped at step {step}" in training.said()


@pytest.fixture
def faked(monkeypatch):
    """In the place of the compiled step one that only counts; returns what happened, in order.

    The loss of step n is n; from step 3 on, its gradient is not finite.
    """
    events: list[tuple[str, int]] = []
    device_get = jax.device_get

    def step(state, _frozen, batch):
        n = int(state.step) + 1
        events.append(("step", n))
        assert batch["image"].shape == (8, 32, 32, 3)
        skipped = jnp.int32(max(n - 2, 0))
        metrics = {
            "loss": jnp.float32(n),
            "part_sum": jnp.array([n, 0.0]),
            "part_count": jnp.array([2.0, 0.0]),
            "nonfinite": skipped,
            "nonfinite_in_a_row": skipped,
        }
        return state.replace(step=state.step + 1), metrics

    def read(tree):
        if isinstance(tree, dict) and "loss" in tree:
            events.append(("read", int(tree["loss"])))
        return device_get(tree)

    monkeypatch.setattr(loop, "compile_step", lambda *_: step)
    monkeypatch.setattr(jax, "device_get", read)
    return events


def test_a_step_is_dispatched_before_the_metrics_of_the_previous_one_are_read(
    faked, tmp_path, tiny_recipe
):
    train(tiny_recipe(steps=4), tmp_path, log=quiet)
    order = ["step 1", "step 2", "read 1", "step 3", "read 2", "step 4", "read 3", "read 4"]
    assert [f"{what} {n}" for what, n in faked] == order


def test_lines_are_means_over_the_updates_since_the_last(faked, tmp_path, tiny_recipe):
    train(tiny_recipe(steps=6, log_every=4), tmp_path, log=quiet)
    first, second = records(tmp_path)
    assert (first["step"], first["loss"], first["skipped_updates"]) == (4, 1.5, 2)
    assert first["part"] == [3 / 4, None]
    # All of the second line's updates were skipped: it has no means.
    assert (second["step"], second["skipped_updates"]) == (6, 4)
    assert not {"loss", "part"} & second.keys()


def test_many_updates_in_a_row_that_are_not_finite_end_the_run(faked, tmp_path, tiny_recipe):
    with pytest.raises(UserError, match=r"not finite for 3 steps in a row, until step 5"):
        train(tiny_recipe(steps=100, max_nonfinite=3), tmp_path, log=quiet)
    assert faked[-2:] == [("step", 6), ("read", 5)]


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_fresh_starts_again(faked, tmp_path, tiny_recipe):
    train(tiny_recipe(steps=2), tmp_path, log=quiet)
    faked.clear()
    assert train(tiny_recipe(steps=2), tmp_path, log=quiet).finished
    assert faked == []
    train(tiny_recipe(steps=3), tmp_path, log=quiet)
    assert ("step", 2) not in faked
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]
    faked.clear()
    train(tiny_recipe(steps=2, seed=1), tmp_path, fresh=True, log=quiet)
    assert faked[0] == ("step", 1)
    assert [r["step"] for r in records(tmp_path)] == [1, 2]


def test_evaluators_run_at_their_intervals_before_the_last_step(faked, tmp_path, tiny_recipe):
    seen = []

    def evaluate(state, frozen, tokenizers, due):
        assert set(tokenizers) == {"text"}
        seen.append((int(state.step), [evaluator.every for evaluator in due]))
        return Report(scalars={"samples/figure": 10.0 * int(state.step)})

    grids = tuple(SampleGrid(prompts=("a pea",), every=every) for every in (2, 3, 0))
    config = dataclasses.replace(tiny_recipe(steps=6), evaluators=grids)
    train(config, tmp_path, evaluate=evaluate, log=quiet)
    assert seen == [(2, [2]), (3, [3]), (4, [2])]
    figures = {r["step"]: r["samples/figure"] for r in records(tmp_path) if "samples/figure" in r}
    assert figures == {2: 20.0, 3: 30.0, 4: 40.0}
    assert [r["step"] for r in records(tmp_path) if "images_per_s" in r] == [1, 2, 3, 4, 5, 6]


def test_evaluators_without_scalars_add_no_lines(faked, tmp_path, tiny_recipe):
    train(evaluated(tiny_recipe(steps=4)), tmp_path, evaluate=lambda *_: Report(), log=quiet)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4]


def test_records_that_cannot_be_used_are_named_and_counted(
    faked, tmp_path, tiny_recipe, monkeypatch, caplog
):
    whole = Produce.__getitem__

    def without_caption(self, index):
        record = whole(self, index)
        return record | {"captions": []} if index == 7 else record

    monkeypatch.setattr(Produce, "__getitem__", without_caption)
    recipe = tiny_recipe(steps=6)
    data = dataclasses.replace(recipe.data, source=Produce(size=32, length=12))
    train(dataclasses.replace(recipe, data=data), tmp_path, log=quiet)
    reported = [r.getMessage() for r in caplog.records if "Skipped" in r.getMessage()]
    assert len(reported) >= 3
    assert all("produce/train/7" in line for line in reported)
    assert sum(r["skipped_records"] for r in records(tmp_path)) == len(reported)


def _photos(folder, count, lost):
    """A source of `count` images with a caption, and of `lost` without."""
    folder.mkdir()
    for number in range(count + lost):
        Image.new("RGB", (32, 32)).save(folder / f"{number:03}.png")
        if number < count:
            (folder / f"{number:03}.txt").write_text("a green pea")
    return ImageFolder(path=str(folder))


def test_what_the_source_left_out_is_logged_and_counted(faked, tmp_path, tiny_recipe):
    recipe, said = tiny_recipe(steps=2), []
    data = dataclasses.replace(recipe.data, source=_photos(tmp_path / "photos", 8, 1))
    train(dataclasses.replace(recipe, data=data), tmp_path / "run", log=said.append)
    assert "Found 9 records, left out 1: 1 without a caption." in said
    assert f"Left out {tmp_path}/photos/008.png: it has no .txt file" in said
    assert [r["left_out_records"] for r in records(tmp_path / "run")] == [1, 1]


def test_too_many_left_out_stop_a_run_before_it_begins(tmp_path, tiny_recipe):
    recipe = tiny_recipe(steps=2)
    source = _photos(tmp_path / "photos", 8, 1)
    data = dataclasses.replace(recipe.data, source=source, max_bad_fraction=0.0)
    with pytest.raises(UserError, match=r"11\.1% of the 9 records found .*008\.png"):
        train(dataclasses.replace(recipe, data=data), tmp_path / "run", log=quiet)
    assert not (tmp_path / "run").exists()


def test_a_skipped_update_is_reported(faked, tmp_path, tiny_recipe, caplog):
    train(tiny_recipe(steps=4), tmp_path, log=quiet)
    reported = [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()]
    assert [line.split(":")[0] for line in reported] == [
        f"Step {n} skipped its update" for n in (3, 4)
    ]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        pytest.param(errno.EROFS, "Read-only file", marks=pytest.mark.nightly),
    ],
)
def test_a_save_that_fails_ends_the_run_and_the_one_before_goes_on(
    faked, tmp_path, tiny_recipe, monkeypatch, number, message
):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    train(tiny_recipe(steps=2), tmp_path, log=quiet)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "complete", fail)
        with pytest.raises(UserError, match=rf"step 4 .* {message}.*; that of step 2 is kept.*"):
            train(tiny_recipe(steps=6), tmp_path, log=quiet)
    faked.clear()
    train(tiny_recipe(steps=6), tmp_path, log=quiet)
    assert [n for what, n in faked if what == "step"] == [3, 4, 5, 6]
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_goes_on(
    faked, tmp_path, tiny_recipe
):
    train(tiny_recipe(steps=4), tmp_path, log=quiet)
    files = [path for path in (tmp_path / "checkpoints" / "4").rglob("*") if path.is_file()]
    path = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    faked.clear()
    logged = []
    train(tiny_recipe(steps=4), tmp_path, log=logged.append)
    assert any("checkpoints/4 is damaged and not used" in line for line in logged)
    assert "Resuming at step 2 of 4." in logged
    assert [n for what, n in faked if what == "step"] == [3, 4]


@pytest.mark.nightly
def test_a_data_worker_that_dies_ends_the_run_which_then_goes_on(faked, tmp_path, tiny_recipe):
    def kill(state, *_):
        if int(state.step) == 3:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
        return Report()

    def recipe(workers):
        config = evaluated(tiny_recipe(steps=60, max_nonfinite=100))
        return dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))

    with pytest.raises(UserError, match=r"A data worker died \(exit code -9; .*data\.workers"):
        train(recipe(1), tmp_path, evaluate=kill, log=quiet)
    reported = []
    train(recipe(0), tmp_path, log=reported.append)
    assert any(line.startswith("Resuming at step") for line in reported)


def test_a_shard_that_vanishes_is_reported_by_its_records(faked, tmp_path, tiny_recipe):
    shards = tmp_path / "shards"
    shards.mkdir()
    rendered = Produce(size=32, length=400)
    for i in range(2):
        part = (rendered[k] for k in range(200 * i, 200 * i + 200))
        write_array_record(str(shards / f"{i}.array_record"), part)
    config = evaluated(tiny_recipe(steps=100, max_nonfinite=100, checkpoint_every=50))
    source = ArrayRecord(path=str(shards))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=source, shuffle=False),
        tokenizer=dataclasses.replace(config.tokenizer, records=1),  # of the other shard
    )

    def lose(*_):
        (shards / "1.array_record").unlink(missing_ok=True)
        return Report()

    with pytest.raises(UserError, match=r"cannot be used, among them .*1\.array_record"):
        train(config, tmp_path / "run", evaluate=lose, log=quiet)
    assert records(tmp_path / "run")[-1]["step"] >= 200 // 8 - 2


def test_the_clock_of_the_day_may_be_set_back(faked, tmp_path, tiny_recipe, monkeypatch):
    clock = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    result = train(tiny_recipe(steps=6), tmp_path, log=quiet)
    assert result.finished
    for record in records(tmp_path):
        assert 0 < record["images_per_s"] < np.inf
        assert 0 <= record["data_wait"] <= 1


def test_frozen_parts_are_split_and_of_the_type_that_steps_compute_in(
    tmp_path, tiny_recipe, monkeypatch
):
    """On the devices; on disk they stay float32."""
    seen = []

    def step(state, frozen, batch):
        seen.append(frozen["text_encoders"]["text"])
        return state.replace(step=state.step + 1), {"loss": jnp.float32(1), **NO_SKIPS}

    monkeypatch.setattr(loop, "compile_step", lambda *_: step)
    recipe = tiny_recipe(steps=1, compute="bfloat16")
    recipe = dataclasses.replace(
        recipe,
        task=dataclasses.replace(recipe.task, trainable=Trainable()),
        mesh=MeshConfig(data=2, fsdp=4),
    )
    train(recipe, tmp_path, log=quiet)
    (frozen,) = seen
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {np.dtype(jnp.bfloat16)}
    table = frozen["token_embedding"]
    assert table.addressable_shards[0].data.shape == (600 // 4, 16)
    stored = read_weights(epath.Path(tmp_path) / FROZEN)["text_encoders"]["text"]["token_embedding"]
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(table, stored.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshConfig(data=16)}, "does not fit the 8 devices"),
        ({"batch_size": 12}, r"train\.batch_size 12 is not divisible by 8"),
        ({"accumulate": 3}, r"3 micro-batches.* multiple of 24"),
    ],
)
def test_batches_that_do_not_fit_the_devices_are_refused_before_any_write(
    changes, message, tmp_path, tiny_recipe
):
    mesh = changes.pop("mesh", MeshConfig())
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(tiny_recipe(**changes), mesh=mesh), tmp_path, log=quiet)
    assert list(tmp_path.iterdir()) == []
