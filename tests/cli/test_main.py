import dataclasses
import re

import jax
import numpy as np
import pytest
from etils import epath

from jaxdiff.cli import main as cli
from jaxdiff.errors import UserError
from jaxdiff.io import files
from jaxdiff.pretrained.load import read_bundle, write_bundle
from jaxdiff.training.recipe import load_recipe

COMMANDS = ("train", "sample", "evaluate", "export", "prepare", "explore", "plan", "bench")


@pytest.fixture
def started(monkeypatch):
    """What `train` would have run: recipe, folder, and whether afresh."""
    runs = []
    monkeypatch.setattr(
        cli, "run_recipe", lambda config, out, *, fresh: runs.append((config, out, fresh))
    )
    return runs


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), *((c, "--help") for c in COMMANDS)])
def test_help_is_given(words, capsys):
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    for command in COMMANDS if len(words) < 2 else words[:1]:
        assert command in text


def test_the_help_of_train_tells_keys_of_the_recipe_and_flags_of_its_own(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--out", "--resume", "--fresh", "--train.steps", "--data.source.length"):
        assert re.search(rf"{re.escape(flag)}\b", text), flag


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("trian",), "did you mean train?"),
        (
            ("bogus-word",),
            "there are train, sample, evaluate, export, prepare, explore, plan, bench.",
        ),
        (("train", "--train.stps", "5"), "--train.stps: did you mean --train.steps?"),
        (("train", "--train.btach_size=5"), "--train.btach_size: did you mean --train.batch-size?"),
        (("train", "--data.source.lenght", "5"), "did you mean --data.source.length?"),
        (("train", "--ou", "x"), "did you mean --out?"),
        (("train", "--fersh"), "did you mean --fresh?"),
        (("train", "--zzzzzzzzzzzz"), "see train --help"),
        (("train", "--out", "x", "configs/produce.py"), "no place for 'configs/produce.py'"),
        (("train", "configs/prodce.py"), "did you mean configs/produce.py?"),
        (("train", "--train.steps", "0"), "train.steps is 0"),
        (("train", "--resume", "--fresh"), "exclude each other"),
        (("sample", "a pea", "--num-step", "3"), "did you mean --num-steps?"),
        (("evaluate", "runs/x", "--sample", "3"), "did you mean --samples?"),
        (("evaluate", "nowhere"), "nowhere holds no model"),
        (("export", "nowhere", "out"), "nowhere holds no model"),
        (("export", "a", "b", "--dtype", "int8"), "expected bfloat16, float16 or float32"),
        (("export", "a", "b", "--format", "ckpt"), "diffusers, lora or embedding"),
        (("export", "shipped:produce", "b", "--format", "diffusers"), "no Stable Diffusion model"),
    ],
)
def test_a_users_mistake_is_told_in_one_line(refused, started, words, told, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = refused(*words)
    assert told in message
    assert message.count("\n") == 1
    assert not started


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("train", "--train.steps", "many"), "--train.steps"),
        (("train", "--train.compute", "float8"), "bfloat16"),
        (("train", "--out"), "--out"),
        (("export", "runs/x"), "Folder to write"),
        (("evaluate",), "Folder of a run"),
    ],
)
def test_a_value_that_cannot_be_read_is_told_in_one_line(refused, started, words, told):
    message = refused(*words)
    assert told in message
    assert message.count("\n") == 1
    assert not started


def test_a_flag_is_never_said_to_be_meant_when_it_was_given(refused):
    for flag in ("--prompts", "--task.curriculum", "--data.no-shuffle", "--config.name"):
        command = ("sample", "a pea") if flag == "--prompts" else ("train",)
        assert f"did you mean {flag}?" not in refused(*command, flag, "1")


def test_train_alone_runs_the_default_recipe(started):
    assert cli.main(["train"]) == 0
    [(config, out, fresh)] = started
    assert config == load_recipe("configs/produce.py")
    assert (out, fresh) == ("runs/produce", False)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (("--train.steps", "5"), {"train": {"steps": 5}}),
        (("--train.steps=5",), {"train": {"steps": 5}}),
        (("--train.batch_size", "4"), {"train": {"batch_size": 4}}),
        (("--train.batch-size", "4"), {"train": {"batch_size": 4}}),
        (("--data.shuffle", "False"), {"data": {"shuffle": False}}),
        (("--mesh.data", "-1"), {"mesh": {"data": -1}}),
        (("--sampling.interval", "0.1", "0.9"), {"sampling": {"interval": (0.1, 0.9)}}),
        (("--sampling.guidance-scale=-1.5",), {"sampling": {"guidance_scale": -1.5}}),
        (("--sampling.guidance-scale", "-1.5"), {"sampling": {"guidance_scale": -1.5}}),
        (("--sampling.prompts", "a pea", "two"), {"sampling": {"prompts": ("a pea", "two")}}),
        (("--name", "mine"), {"name": "mine"}),
    ],
)
def test_keys_of_the_recipe_are_changed(recipe, started, words, changes):
    assert cli.main(["train", recipe, *words]) == 0
    expected = load_recipe(recipe)
    for key, change in changes.items():
        if isinstance(change, dict):
            change = dataclasses.replace(getattr(expected, key), **change)
        expected = dataclasses.replace(expected, **{key: change})
    assert started[0][0] == expected
    assert started[0][1] == f"runs/{expected.name}"


def test_flags_of_train_itself_stand_anywhere(recipe, started):
    for words in (
        ["--out", "x", "--train.steps", "3"],
        ["--train.steps=3", "--resume", "--out=x"],
        ["--fresh", "--train.steps", "3", "--out", "x"],
    ):
        assert cli.main(["train", recipe, *words]) == 0
        config, out, fresh = started[-1]
        assert (config.train.steps, out, fresh) == (3, "x", "--fresh" in words)


def test_a_file_that_is_no_recipe_is_told(tmp_path, refused):
    (tmp_path / "empty.py").write_text("")
    assert "defines no get_config()" in refused("train", str(tmp_path / "empty.py"))
    (tmp_path / "notes.txt").write_text("")
    assert "is no recipe" in refused("train", str(tmp_path / "notes.txt"))
    assert "There is no recipe" in refused("train", str(tmp_path))


def test_a_programming_error_keeps_its_traceback(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", str(tmp_path / "broken.py")])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_export_writes_what_load_takes(tiny_bundle, tmp_path, capsys, dtype):
    run, out = str(tmp_path / "run"), str(tmp_path / "out" / "model")
    write_bundle(run, tiny_bundle, dtype="float32")
    assert cli.main(["export", run, out, "--dtype", dtype]) == 0
    assert out in capsys.readouterr().out
    exported = read_bundle(out)
    assert exported.config == tiny_bundle.config
    rounded = jax.tree.map(
        lambda x: np.asarray(jax.numpy.asarray(x).astype(dtype).astype("float32")),
        tiny_bundle.params,
    )
    jax.tree.map(np.testing.assert_array_equal, exported.params, rounded)


def test_what_a_command_raises_is_told_in_one_line(refused, monkeypatch):
    def fail(*_, **__):
        raise UserError("It is full: empty it.")

    monkeypatch.setattr(cli, "run_recipe", fail)
    assert refused("train") == "jaxdiff: It is full: empty it.\n"


def test_what_a_clouds_storage_lacks_is_told(refused, monkeypatch):
    words = ("sample", "a pea", "--out", "gs://bucket/drawn")
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    assert "pip install 'jaxdiff[gcs]'" in refused(*words)

    def forbid(_):
        raise RuntimeError("Anonymous caller does not have access\nto the bucket")

    monkeypatch.setattr(files, "find_spec", lambda name: name)
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", forbid)
    told = refused(*words[:2], "--out=gs://bucket/drawn")
    assert "gs://bucket/drawn cannot be reached (Anonymous caller does not have access)" in told
