import errno
import io
import json
import math
import os
import struct
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Report
from jaxdiff.training import metrics, tensorboard
from jaxdiff.training.metrics import RECORDS, MetricsWriter, Progress, Throughput


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def shown_values(folder):
    """(tag, step) -> value of what TensorBoard would show; a record is length, crc, data, crc."""
    found = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found |= {(v.tag, event.step): v for v in event.summary.value}
    return found


def scalars(folder):
    return {place: value.simple_value for place, value in shown_values(folder).items()}


class Clock:
    """A clock that advances only by `wait`."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def test_records_are_in_the_file_at_once_and_in_tensorboard_at_the_end(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(10, {"loss": 0.5, "loss_by_noise": np.array([0.25, 0.75])})
        assert records(tmp_path / "run") == [
            {"step": 10, "loss": 0.5, "loss_by_noise": [0.25, 0.75]}
        ]
        writer.write(20, {"loss": jnp.float32(0.125), "skipped": np.int32(3)})
    assert records(tmp_path / "run")[1] == {"step": 20, "loss": 0.125, "skipped": 3}
    assert scalars(tmp_path / "run") == {
        ("loss", 10): 0.5,
        ("loss_by_noise/0", 10): 0.25,
        ("loss_by_noise/1", 10): 0.75,
        ("loss", 20): 0.125,
        ("skipped", 20): 3.0,
    }


def test_values_that_are_not_finite_become_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": math.nan, "loss_by_noise": [math.inf, 1.0]})
    assert records(tmp_path) == [{"step": 1, "loss": None, "loss_by_noise": [None, 1.0]}]


def test_resuming_drops_lines_that_are_no_records(tmp_path):
    good = '{"step": 1, "loss": null, "note": "caf\\u00e9"}'
    lines = ["[" * 100_000, "3", "[]", '{"step": "x"}', "{}", "\0", '{"step": 1, "loss": NaN}']
    text = "\n".join([*lines, good, '{"step": 1'])
    (tmp_path / RECORDS).write_bytes(b"\xff\n" + text.encode())
    with MetricsWriter(tmp_path, resume_from=1):
        pass
    assert (tmp_path / RECORDS).read_text() == f"{good}\n"


def test_resuming_drops_later_records_and_a_truncated_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')
    with MetricsWriter(tmp_path, resume_from=20) as writer:
        writer.write(25, {"loss": 25.0})
    assert [r["step"] for r in records(tmp_path)] == [10, 20, 25]
    with MetricsWriter(tmp_path):
        assert records(tmp_path) == []
    assert not list(tmp_path.glob(".partial*"))


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_storage_that_cannot_append_receives_whole_files(tmp_path, monkeypatch):
    class Bucket(type(epath.Path(tmp_path))):
        def __str__(self):
            return f"test://{super().__str__()}"

    board = SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)
    monkeypatch.setattr(metrics.epath, "Path", Bucket)
    monkeypatch.setattr(tensorboard, "TensorBoard", lambda *_, **__: board)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        assert records(tmp_path) == []
        monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0.0)
        writer.write(2, {"loss": 2.0})
        assert [r["step"] for r in records(tmp_path)] == [1, 2]
        monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 60.0)
        writer.write(3, {"loss": 3.0})
    with MetricsWriter(tmp_path, resume_from=2) as writer:
        writer.write(4, {"loss": 4.0})
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 4]


def test_wandb_keeps_its_id_only_when_resumed(tmp_path, monkeypatch):
    runs = []

    def init(**settings):
        run = SimpleNamespace(settings=settings, logged=[], id=settings["id"] or f"id{len(runs)}")
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda: run.logged.append("finished")
        runs.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for resume_from in (0, 5, 0):
        with MetricsWriter(
            tmp_path, resume_from=resume_from, wandb=True, config={"lr": 1}
        ) as writer:
            writer.write(resume_from + 1, {"loss": 1.0, "levels": [2.0]})
    assert [run.id for run in runs] == ["id0", "id0", "id2"]
    assert runs[1].logged == [(6, {"loss": 1.0, "levels/0": 2.0}), "finished"]
    assert runs[0].settings["config"] == {"lr": 1}


def test_reports_of_evaluators_are_scalars_and_images(tmp_path, monkeypatch):
    logged = []
    run = SimpleNamespace(id="id", finish=lambda: None)
    run.log = lambda values, step: logged.append((step, values))
    wandb = SimpleNamespace(init=lambda **_: run, Image=lambda image: ("image", image))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    with MetricsWriter(tmp_path, wandb=True) as writer:
        writer.write_report(3, Report(scalars={"a/mean": 0.5}, images={"a/samples": image}))
        writer.write_report(4, Report(images={"a/strip": image}))
        writer.write_report(5, Report())
    assert records(tmp_path) == [{"step": 3, "a/mean": 0.5}]
    found = shown_values(tmp_path)
    assert found.keys() == {("a/mean", 3), ("a/samples", 3), ("a/strip", 4)}
    for place in (("a/samples", 3), ("a/strip", 4)):
        encoded = io.BytesIO(found[place].image.encoded_image_string)
        np.testing.assert_array_equal(np.asarray(Image.open(encoded).convert("RGB")), image)
    assert logged[0] == (3, {"a/mean": 0.5})
    assert [(step, list(values)) for step, values in logged[1:]] == [
        (3, ["a/samples"]),
        (4, ["a/strip"]),
    ]
    assert logged[2][1]["a/strip"][1] is image


def test_a_refusal_of_wandb_is_a_sentence_before_anything_is_written(tmp_path, monkeypatch):
    class Error(Exception):
        pass

    def init(**_):
        raise Error("No API key configured.\nLog in.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Error))
    with pytest.raises(UserError, match=r"No API key configured\. Log in: expected a key"):
        MetricsWriter(tmp_path / "run", wandb=True)
    assert not (tmp_path / "run").exists()


def test_missing_wandb_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[wandb\]'"):
        MetricsWriter(tmp_path / "run", wandb=True)
    assert not (tmp_path / "run").exists()


def test_rates_exclude_compilation_and_pauses():
    clock = Clock()
    throughput = Throughput(8, flops_per_image=1e9, peak_flops=1e11, clock=clock)
    with throughput.timed("compile"):
        clock.wait(30)
    for _ in range(4):
        with throughput.timed("data"):
            clock.wait(0.5)
        clock.wait(0.3)
        with throughput.timed("device"):
            clock.wait(1.2)
        throughput.step()
    with throughput.timed("pause"):
        clock.wait(100)
    assert throughput.rates() == pytest.approx(
        {
            "images_per_s": 4.0,
            "step_s": 2.0,
            "data_wait": 0.25,
            "device_wait": 0.6,
            "host": 0.15,
            "mfu": 0.04,
            "compile_s": 30,
        }
    )


def test_windows_are_independent():
    clock = Clock()
    throughput = Throughput(8, clock=clock)
    with throughput.timed("data"):
        clock.wait(1)
    throughput.step()
    split = {"data_wait": 1.0, "device_wait": 0.0, "host": 0.0}
    assert throughput.rates() == {"images_per_s": 8.0, "step_s": 1.0} | split
    clock.wait(2)
    throughput.step()
    split = {"data_wait": 0.0, "device_wait": 0.0, "host": 1.0}
    assert throughput.rates() == {"images_per_s": 4.0, "step_s": 2.0} | split
    assert throughput.rates()["images_per_s"] == 0.0


def shown(terminal, total, steps, clock, every=15.0):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with Progress(total, console=console, clock=clock, every=every) as progress:
        for step in steps:
            clock.wait(1)
            progress.update(step, loss=1 / step, images_per_s=1234.5, noise=0.3)
    return out.getvalue()


def test_a_log_has_occasional_lines_and_one_at_the_end():
    lines = shown(False, 100, range(1, 101), Clock(), every=20.0).splitlines()
    assert [line.split()[1] for line in lines] == [
        "1/100",
        "21/100",
        "41/100",
        "61/100",
        "81/100",
        "100/100",
    ]
    assert lines[2] == "step 41/100  loss 0.02439  1,234.5 images/s  noise <= 30%  0:00:59 left"
    assert lines[-1].endswith("0:00:00 left")


def test_a_terminal_has_one_live_line():
    text = shown(True, 3, [1, 2, 3], Clock())
    assert "step 3/3" in text
    assert "images/s" in text
    assert text.count("\n") <= 1


def test_time_left_counts_from_the_step_of_the_resume():
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=False, width=100)
    with Progress(10_000, start=5_000, console=console, clock=clock, every=0.0) as progress:
        clock.wait(500)  # compiles
        progress.update(5_001)
        clock.wait(2)
        progress.update(5_002)
    assert out.getvalue().splitlines()[-1] == "step 5002/10000  2:46:36 left"


def test_only_process_0_shows_progress(monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    assert shown(False, 2, [1, 2], Clock()) == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_an_update_takes_less_than_a_millisecond(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with Progress(10_000, console=console) as progress:
        start = time.process_time()
        for step in range(2_000):
            progress.update(step, loss=0.5)
        assert (time.process_time() - start) / 2_000 < 1e-3


def test_a_full_disk_ends_tensorboard_and_is_reported_once(tmp_path, monkeypatch, caplog):
    def fill(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricsWriter(tmp_path) as writer:
        monkeypatch.setattr(tensorboard.EventsWriter, "write_event", fill)
        for step in range(1, 100):
            writer.write(step, {"loss": 1.0})
    (said,) = [record.getMessage() for record in caplog.records]
    assert "tensorboard cannot be written (No space left on device)" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 99
