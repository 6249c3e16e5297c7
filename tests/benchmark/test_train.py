import dataclasses
import json

import jax
import pytest

from jaxdiff.benchmark import synthetic, train
from jaxdiff.cli import main as cli
from jaxdiff.cli.bench import BenchOptions, measure_and_tell
from jaxdiff.distributed import chips
from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.errors import UserError


@pytest.fixture(scope="module")
def found(tiny_recipe, tmp_path_factory) -> dict:
    """The report of the tiny recipe's step, fed from its data, on one of the devices."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    options = BenchOptions(
        config=tiny_recipe(), json=str(path), warmup=1, repeats=4, real_data=True, peak_tflops=0.5
    )
    measure_and_tell("train", options)
    return json.loads(path.read_text())


def test_a_step_is_timed_and_its_figures_agree_with_each_other(found, tiny_recipe):
    ours = found["results"]["jaxdiff"]
    assert len(ours["seconds"]) == 4
    assert ours["compile_s"] > 0
    assert 0 <= ours["data_wait"] < 1
    assert ours["p90_s"] >= ours["median_s"]
    config = tiny_recipe()
    flops = config.task.flops_per_image(32) * config.train.batch_size
    rate = flops / ours["median_s"] / 1e12 / found["hardware"]["devices"]
    assert ours["model_tflops_per_s_per_device"] == pytest.approx(rate)
    assert ours["mfu"] == pytest.approx(rate / 0.5)
    assert found["options"]["real_data"] is True


def test_a_chip_in_the_table_needs_no_peak(monkeypatch):
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    peak, note = train.peak_of_device(None)
    assert peak == pytest.approx(989)
    assert "H100 data sheet" in note


def test_the_peak_of_an_unknown_chip_is_not_guessed():
    assert chips.find_chip(jax.devices()[0].device_kind) is None
    peak, note = train.peak_of_device(None)
    assert peak is None
    assert "give --peak-tflops" in note
    with pytest.raises(UserError, match="--peak-tflops is 0"):
        train.peak_of_device(0.0)


def test_a_random_batch_has_the_shapes_of_the_recipes(tiny_recipe):
    config = dataclasses.replace(tiny_recipe(), mesh=MeshConfig(data=8))
    batch = synthetic.batch(config, make_mesh(config.mesh))
    assert batch["image"].shape == (8, 32, 32, 3)
    ids = batch["text"].ids["text"]
    assert ids.shape == (8, 16)
    assert not batch["text"].absent.any()
    assert batch["size_crop"].tolist()[0] == [32, 32, 0, 0, 32, 32]
    assert int(ids.max()) < 600
    assert len(batch["image"].addressable_shards) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("speed",), "There is no benchmark 'speed': there are train, sample, data, checkpoint"),
        (("compare", "a.json"), "takes two reports: got 1 words"),
        (("compare", "a.json", "b.json"), "a.json cannot be read"),
        (("train", "--repeats", "2"), "--repeats is 2"),
        (("train", "--peak-tflops", "-1", "--repeats", "3"), "--peak-tflops is -1"),
        (("sample", "--against", "torch"), "bench sample has nothing beside it"),
        (("sample", "configs/produce_clip.py"), "draws no images from prompts"),
        (("train", "--warmpu", "2"), "did you mean --warmup?"),
    ],
)
def test_a_user_error_is_one_line(words, message, capsys):
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_is_given(capsys):
    assert cli.main(["bench"]) == 0
    assert "compare BEFORE.json AFTER.json" in capsys.readouterr().out
