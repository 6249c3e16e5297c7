"""The comparisons with PyTorch take the flags of `jaxdiff bench` and write the same reports."""

import json

import pytest

torch = pytest.importorskip("torch")

pytest.importorskip("diffusers")

from benchmarks import command, torch_data
from benchmarks.torch_denoisers import DENOISERS, contenders
from tests.parity.torch_models import relative

pytestmark = pytest.mark.parity


def test_the_loaders_are_timed_on_the_same_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch_data, "RECORDS", 8)
    words = ["--train.batch-size", "4", "--warmup", "0", "--repeats", "3"]
    out = tmp_path / "report.json"
    assert command.run("data", torch_data.measure, [*words, "--json", str(out)]) == 0
    assert "latents of 512, torch: median" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["options"] == {"warmup": 0, "repeats": 3}
    assert len(report["results"]) == 4
    assert all(len(result["seconds"]) == 3 for result in report["results"].values())


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--repeats", "2"), "data: --repeats is 2"), (("--warmpu", "2"), "did you mean --warmup?")],
)
def test_a_user_error_is_one_sentence(words, message, capsys):
    assert command.run("data", torch_data.measure, words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["FLUX.1", "FLUX.2", "Z-Image"])
def test_denoisers_are_timed_on_the_same_weights_and_inputs(name):
    made = contenders(DENOISERS[name], batch=2, size=32, heads=1)
    assert relative(made.jaxdiff(), made.diffusers(made.network)) < 1e-5
