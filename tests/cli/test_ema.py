"""`jaxdiff ema`: averages of a run as a model, and the search for the best width."""

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxdiff.cli import main as cli
from jaxdiff.config.serialization import accept_types
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Evaluator, Report
from jaxdiff.pretrained.bundle import write_tokenizers
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.training.ema import Ema
from jaxdiff.training.post_hoc_ema import PostHocEma, Snapshots
from jaxdiff.training.workdir import write_config

STEPS = (2, 4, 6, 8)
MEASURED = []


@dataclass(frozen=True, kw_only=True)
class Distance(Evaluator):
    """The distance of the last parameter from a number that only one width reaches."""

    name: ClassVar[str] = "distance"
    goal: ClassVar = "min"
    every: int = 0

    def evaluate(self, context):
        value = float(np.asarray(jax.tree.leaves(context.params["denoiser"])[0]).ravel()[0])
        MEASURED.append(value)
        return Report(scalars={"to": abs(value - 7.5)})


@pytest.fixture(scope="module")
def run(tiny_recipe, tiny_bundle, tmp_path_factory):
    """The folder of a run whose parameters grow by 1 with every step, times those of the tiny one.

    A width is then the mean step of its average, (gamma + 1) / (gamma + 2) of 8.
    """
    folder = epath.Path(tmp_path_factory.mktemp("run"))
    settings = PostHocEma(snapshot_every=2, dtype="float32")
    config = dataclasses.replace(
        tiny_recipe(), ema=Ema(post_hoc=settings), evaluators=(Distance(),)
    )
    write_config(folder, config)
    write_tokenizers(folder, tiny_bundle.tokenizers)
    (folder / "checkpoints").mkdir()
    update = jax.jit(settings.update)
    ones = jax.tree.map(jnp.ones_like, tiny_bundle.params)
    averages = settings.init(ones)
    with Snapshots(folder, settings, pytest.fail) as snapshots:
        for step in range(8):
            averages = update(averages, jax.tree.map(lambda x, n=step: x * (n + 1), ones), step)
            snapshots.after(step + 1, averages)
    return folder


@pytest.fixture(autouse=True)
def _own_types():
    MEASURED.clear()
    with accept_types([Distance]):
        yield


def first(folder) -> float:
    return float(np.asarray(jax.tree.leaves(load_bundle(str(folder)).params)[0]).ravel()[0])


def test_the_weights_of_a_width_are_a_model(run, tmp_path, capsys):
    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    for folder, width in ((narrow, "0.05"), (wide, "0.2")):
        words = ("ema", str(run), "--width", width, "--out", str(folder), "--dtype", "float32")
        assert cli.main(words) == 0
    assert 8 > first(narrow) > first(wide) > 5
    assert "averaged with width 0.2 up to step 8" in capsys.readouterr().out
    assert json.loads((wide / "ema.json").read_text())["width"] == 0.2
    assert (wide / "README.md").exists()


def test_a_search_writes_the_best_width_and_resumes(run, capsys):
    words = ["ema", str(run), "--search", "distance/to", "--widths", "0.05,0.1,0.15"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "Best width: 0.1\n" in said
    assert (run / "ema_0.1" / "config.json").exists()
    assert len(MEASURED) == 3
    assert cli.main([*words[:-1], "0.05,0.08,0.1,0.15"]) == 0
    assert len(MEASURED) == 4
    assert "width 0.08" in capsys.readouterr().out


def test_a_search_checks_the_data_before_it_identifies_them(run, monkeypatch, capsys):
    def refuse(*_):
        raise UserError("evaluator 'distance' needs images: leave it out.")

    monkeypatch.setattr(Distance, "check", refuse)
    monkeypatch.setattr(Distance, "fingerprints", lambda *_: pytest.fail("not checked"))
    assert cli.main(["ema", str(run), "--search", "distance/to"]) == 2
    assert "needs images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "expected either --width, such as --width 0.05, or --search"),
        (("--width", "0.3"), "expected a number from 0.001 to 0.28"),
        (("--search", "fid/fid"), "no evaluator of the recipe reports 'fid/fid'"),
        (("--search", "distance/far"), "the evaluator reports no 'distance/far'"),
        (("--search", "distance/to", "--widths", "1:0:1"), "expected LOW:HIGH:STEP"),
    ],
)
def test_mistakes_are_one_sentence(run, words, says, capsys):
    assert cli.main(["ema", str(run), *words]) == 2
    assert says in capsys.readouterr().err
