"""`jaxdiff export` of adapters and added tokens, and what it leaves out."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdiff.cli import export
from jaxdiff.cli import main as cli
from jaxdiff.config.serialization import to_json
from jaxdiff.errors import UserError
from jaxdiff.models.lora import Adapters, Factors, LoraConfig
from jaxdiff.pretrained.bundle import Bundle, write_bundle
from jaxdiff.pretrained.embeddings import Word, read_embedding
from jaxdiff.pretrained.lora import read_lora, write_lora
from jaxdiff.training.tasks.diffusion import Pretrained, TextualInversion, Trainable
from jaxdiff.training.workdir import write_config
from tests.pretrained.families import SPECS

PAIR = {"down": np.ones((1, 32, 2), np.float32), "up": np.ones((1, 2, 32), np.float32)}
ADAPTERS = {"denoiser": {"double": {"image": {"q": {"lora": PAIR}}}}}
WORD = Word("<pea>", {"text": np.ones((2, 32), np.float32)})


@pytest.fixture
def recipe(tiny_recipe):
    """`recipe(lora=...)`: the tiny recipe of a run that trains these parts of a trained model."""

    def make(**trainable):
        recipe = tiny_recipe()
        task = dataclasses.replace(
            recipe.task,
            curriculum=None,
            pretrained=Pretrained(denoiser="shipped:produce", text_encoders="shipped:produce"),
            trainable=Trainable(**trainable),
        )
        return dataclasses.replace(recipe, task=task)

    return make


@pytest.fixture
def of_run(monkeypatch, tmp_path):
    """`of_run(recipe)`: the folder of a run of a recipe, with adapters or a word as it trains."""

    def make(recipe):
        monkeypatch.setattr(export, "read_word", lambda _: WORD)
        params = {"denoiser": {}, "adapters": ADAPTERS}
        bundle = Bundle(SPECS["FLUX.1 schnell"], params, {})
        monkeypatch.setattr(export, "load_bundle", lambda *_, **__: bundle)
        (tmp_path / "run").mkdir()
        write_config(tmp_path / "run", recipe)
        return str(tmp_path / "run")

    return make


def test_adapters_and_words_are_written_to_a_file(recipe, of_run, tiny_spec, tmp_path, capsys):
    run = of_run(recipe(lora=LoraConfig(), inversion=TextualInversion(word="<pea>")))
    lora, word = (str(tmp_path / "out" / name) for name in ("a.safetensors", "b.safetensors"))
    assert cli.main(["export", run, lora, "--format", "lora"]) == 0
    assert (
        "has also trained added tokens, which --format lora leaves out" in capsys.readouterr().err
    )
    assert set(read_lora(lora, SPECS["FLUX.1 schnell"])["denoiser"])
    words = ["export", run, word, "--format", "embedding", "--dtype", "bfloat16"]
    assert cli.main(words) == 0
    assert "has also trained adapters, which --format embed" in capsys.readouterr().err
    np.testing.assert_array_equal(read_embedding(word, tiny_spec).rows["text"], WORD.rows["text"])
    assert load_file(word)["<pea>"].dtype == ml_dtypes.bfloat16
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a.safetensors",
        "b.safetensors",
    }


def test_a_file_replaces_no_other_and_holds_no_whole_model(recipe, of_run, tmp_path, refused):
    run, mine = of_run(recipe(lora=LoraConfig())), tmp_path / "mine.safetensors"
    mine.write_text("mine")
    for kind in ("lora", "embedding"):
        assert "exists: expected a new file" in refused("export", run, str(mine), "--format", kind)
    for kind in ("jaxdiff", "adapters", "diffusers"):
        said = refused("export", run, str(tmp_path / "new.safetensors"), "--format", kind)
        assert f"--format {kind} writes a folder: expected a name without .safetensors" in said
    assert mine.read_text() == "mine"
    assert not (tmp_path / "new.safetensors").exists()


def test_a_lora_file_leaves_out_no_adapter(tmp_path):
    pair = Factors(PAIR["down"], PAIR["up"])
    adapters: Adapters = {"text_2": {("blocks", "attention", "q"): pair}}
    with pytest.raises(UserError, match=r"no name for text_2\.blocks\.attention\.q, which has"):
        write_lora(tmp_path, adapters, SPECS["FLUX.1 schnell"])
    assert not list(tmp_path.iterdir())


def test_a_model_without_adapters_is_refused_before_anything_is_written(tmp_path, refused):
    for kind in ("adapters", "lora"):
        said = refused("export", "shipped:produce", str(tmp_path / "out"), "--format", kind)
        assert said.count("\n") == 1
        assert "shipped:produce has no adapters" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("trainable", "others"),
    [
        ({"inversion": TextualInversion(word="<pea>")}, "added tokens"),
        ({"text_encoders": True}, "text_encoders.text"),
    ],
)
def test_a_folder_of_adapters_leaves_nothing_out(
    recipe, tiny_bundle, tmp_path, refused, trainable, others
):
    run, params = str(tmp_path / "run"), dict(tiny_bundle.params)
    width = tiny_bundle.spec.denoiser.width
    pair = {"down": np.ones((2, width, 1)), "up": np.ones((2, 1, width))}
    params["adapters"] = {"denoiser": {"blocks": {"attention": {"q": {"lora": pair}}}}}
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    trained = to_json(recipe(lora=LoraConfig(), **trainable))
    write_bundle(run, tiny_bundle._replace(params=params), "float32", trained)
    said = refused("export", run, str(tmp_path / "out"), "--format", "adapters")
    assert f"has also trained {others}, which --format adapters" in said
    assert not (tmp_path / "out").exists()
    alone = to_json(recipe(lora=LoraConfig()))
    write_bundle(run, tiny_bundle._replace(params=params), "float32", alone)
    assert cli.main(["export", run, str(tmp_path / "out"), "--format", "adapters"]) == 0
