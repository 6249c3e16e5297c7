import dataclasses
import gzip
import json
from pathlib import Path

import jax
import pytest

from jaxdiff.benchmark import synthetic
from jaxdiff.benchmark.train import peak_of_device
from jaxdiff.cli import main as cli
from jaxdiff.cli.bench import BenchOptions, run_benchmark
from jaxdiff.distributed import chips
from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.training.abstract import flops_per_image


@pytest.fixture(scope="module")
def found(tiny_recipe, tmp_path_factory) -> dict:
    """A report of the tiny recipe's step, fed from its data."""
    folder = tmp_path_factory.mktemp("bench")
    options = BenchOptions(
        config=tiny_recipe(),
        json=str(folder / "report.json"),
        trace=str(folder / "trace"),
        warmup=1,
        repeats=4,
        real_data=True,
        peak_tflops=0.5,
    )
    run_benchmark("train", options)
    return json.loads((folder / "report.json").read_text())


def test_the_metrics_of_a_timed_step_are_consistent(found, tiny_recipe):
    ours = found["results"]["jaxdiff"]
    assert len(ours["seconds"]) == 4
    assert ours["compile_s"] > 0
    assert 0 <= ours["data_wait"] < 1
    assert ours["p90_s"] >= ours["median_s"]
    config = tiny_recipe()
    flops = flops_per_image(config) * config.train.batch_size
    rate = flops / ours["median_s"] / 1e12 / found["hardware"]["devices"]
    assert ours["model_tflops_per_s_per_device"] == pytest.approx(rate)
    assert ours["mfu"] == pytest.approx(rate / 0.5)
    assert found["options"]["real_data"] is True


def test_three_steps_after_those_that_are_timed_are_traced(found):
    (path,) = Path(found["options"]["trace"]).glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert len([event for event in events if event.get("name") == "train"]) == 3


def test_the_table_of_chips_gives_the_peak(monkeypatch):
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    peak, note = peak_of_device(None)
    assert peak == pytest.approx(989)
    assert "H100 data sheet" in note


def test_the_peak_of_an_unknown_chip_is_unknown(tiny_recipe):
    assert chips.find_chip(jax.devices()[0].device_kind) is None
    peak, note = peak_of_device(None)
    assert peak is None
    assert "give --peak-tflops" in note
    with pytest.raises(UserError, match="peak_tflops is 0"):
        BenchOptions(config=tiny_recipe(), peak_tflops=0.0)


def test_a_random_batch_has_the_recipes_shapes(tiny_recipe):
    config = dataclasses.replace(tiny_recipe(), mesh=MeshConfig(data=8))
    batch = synthetic.random_batch(config, make_mesh(config.mesh))
    assert batch["image"].shape == (8, 32, 32, 3)
    assert batch["text"].ids["text"].shape == (8, 16)
    assert batch["size_crop"].tolist()[0] == [32, 32, 0, 0, 32, 32]
    assert int(batch["text"].ids["text"].max()) < 600
    assert len(batch["image"].addressable_shards) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("speed",), "There is no benchmark 'speed': there are train, sample, data, checkpoint"),
        (("compare", "a.json"), "got 1 words: expected two reports"),
        (("compare", "a.json", "b.json"), "a.json cannot be read"),
        (("train", "--repeats", "2"), "--repeats is 2"),
        (("train", "--peak-tflops", "-1", "--repeats", "3"), "--peak-tflops is -1"),
        (("sample", "configs/produce_clip.py"), "generates no images from prompts"),
        (("train", "--warmpu", "2"), "did you mean --warmup?"),
    ],
)
def test_a_user_error_is_one_sentence(words, message, capsys):
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    assert cli.main(["bench"]) == 0
    assert "compare BEFORE.json AFTER.json" in capsys.readouterr().out
