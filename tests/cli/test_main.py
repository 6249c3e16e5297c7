import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

import jaxdiff
from jaxdiff.cli import main as cli
from jaxdiff.cli import train
from jaxdiff.cli.export import _cast_to
from jaxdiff.errors import UserError
from jaxdiff.io import files
from jaxdiff.pretrained.bundle import write_bundle
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.training.loop import Result
from jaxdiff.training.recipe import load_recipe

COMMANDS = tuple(cli.COMMANDS)


@pytest.fixture
def started(monkeypatch):
    """The runs that `train` would have started: recipe, folder and `fresh`."""
    runs = []

    def run(config, out, *, fresh):
        runs.append((config, out, fresh))
        return Result({}, None, {}, {}, finished=True)

    monkeypatch.setattr(train, "run_recipe", run)
    return runs


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), *((c, "--help") for c in COMMANDS)])
def test_help_is_printed(words, capsys):
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    for command in COMMANDS if len(words) < 2 else words[:1]:
        assert command in text


def test_help_describes_each_command_in_a_line_of_80_columns(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for command, summary in cli.COMMANDS.items():
        assert any(line.split() == [command, *summary.split()] for line in lines)


def test_the_version_is_that_of_the_metadata(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxdiff {jaxdiff.__version__}\n"
    assert jaxdiff.__version__ == importlib.metadata.version("jaxdiff")
    assert f"\nversion: {jaxdiff.__version__}\n" in Path("CITATION.cff").read_text()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["recipes"], ["sampel"]])
def test_commands_without_a_model_start_without_jax(words):
    code = (
        "import sys; from jaxdiff.cli.main import main; main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, *words]
    modules = subprocess.run(words, capture_output=True, text=True, check=True).stderr.split()
    assert "jaxdiff.cli.main" in modules
    assert not {"jax", "flax", "tyro", "numpy"} & set(modules)


def test_python_m_jaxdiff_has_the_exit_status_of_the_command():
    words = [sys.executable, "-m", "jaxdiff", "sampel"]
    run = subprocess.run(words, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "jaxdiff: There is no command 'sampel': did you mean sample?\n"


def test_every_public_name_is_there():
    for name in jaxdiff.__all__:
        assert getattr(jaxdiff, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = jaxdiff.lode


def test_the_help_of_train_lists_keys_of_the_recipe_and_its_own_flags(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--out", "--resume", "--fresh", "--train.steps", "--data.source.length"):
        assert re.search(rf"{re.escape(flag)}\b", text), flag


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "did you mean train?"),
        (
            ("bogus-word",),
            f"there are {', '.join(COMMANDS)}.",
        ),
        (("train", "--train.stps", "5"), "--train.stps: did you mean --train.steps?"),
        (("train", "--train.btach_size=5"), "--train.btach_size: did you mean --train.batch-size?"),
        (("train", "--data.source.lenght", "5"), "did you mean --data.source.length?"),
        (("train", "--ou", "x"), "did you mean --out?"),
        (("train", "--fersh"), "did you mean --fresh?"),
        (("train", "--zzzzzzzzzzzz"), "see jaxdiff train --help"),
        (("train", "--out", "x", "configs/produce.py"), "unexpected argument 'configs/produce.py'"),
        (("train", "configs/prodce.py"), "did you mean configs/produce.py?"),
        (("train", "prodce"), "did you mean produce?"),
        (("train", "qqqq"), "expected a Python file or one of cifar10, "),
        (("train", "--quiet", "--verbose"), "exclude each other"),
        (("train", "--train.steps", "0"), "train.steps is 0"),
        (("train", "--resume", "--fresh"), "exclude each other"),
        (("sample", "a pea", "--num-step", "3"), "did you mean --num-steps?"),
        (("evaluate", "runs/x", "--sample", "3"), "did you mean --samples?"),
        (("evaluate", "nowhere"), "nowhere holds no recipe"),
        (("export", "nowhere", "out"), "nowhere holds no model"),
        (("export", "a", "b", "--dtype", "int8"), "expected bfloat16, float16 or float32"),
        (("export", "a", "b", "--format", "ckpt"), "diffusers, lora, embedding"),
        (("export", "shipped:produce", "b", "--format", "adapters"), "has no adapters"),
        (("export", "shipped:produce", "b", "--format", "diffusers"), "is no model of diffusers"),
    ],
)
def test_a_user_error_is_one_line(refused, started, words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    error = refused(*words)
    assert message in error
    assert error.count("\n") == 1
    assert not started


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--train.steps", "many"), "--train.steps is 'many': expected a whole number.\n"),
        (("train", "--optimizer.learning-rate", "x"), "learning-rate is 'x': expected a number.\n"),
        (("evaluate", "a", "--samples", "few"), "--samples is 'few': expected a whole number.\n"),
        (("sample", "a", "--dtype", "int4"), "is 'int4': expected one of bfloat16, float32.\n"),
        (("train", "--train.compute", "float8"), "bfloat16"),
        (("train", "--out"), "--out has no value: expected one; see jaxdiff train --help.\n"),
        (("export", "runs/x"), "Folder to write"),
        (("evaluate",), "needs a model"),
    ],
)
def test_an_invalid_value_is_one_line(refused, started, words, message):
    error = refused(*words)
    assert message in error
    assert error.count("\n") == 1
    assert not started


def test_a_flag_is_never_suggested_in_place_of_itself(refused):
    for flag in ("--prompts", "--task.curriculum", "--data.no-shuffle", "--config.name"):
        command = ("sample", "a pea") if flag == "--prompts" else ("train",)
        assert f"did you mean {flag}?" not in refused(*command, flag, "1")


def test_train_alone_runs_the_default_recipe(started):
    assert cli.main(["train"]) == 0
    [(config, out, fresh)] = started
    assert config == load_recipe("produce")
    assert (out, fresh) == ("runs/produce", False)


def _changed(value, changes):
    """A dataclass with changes, nested as its fields are."""
    if not isinstance(changes, dict):
        return changes
    fields = {name: _changed(getattr(value, name), change) for name, change in changes.items()}
    return dataclasses.replace(value, **fields)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (("--train.steps", "5"), {"train": {"steps": 5}}),
        (("--train.steps=5",), {"train": {"steps": 5}}),
        (("--train.batch_size", "4"), {"train": {"batch_size": 4}}),
        (("--train.batch-size", "4"), {"train": {"batch_size": 4}}),
        (("--data.shuffle", "False"), {"data": {"shuffle": False}}),
        (("--mesh.data", "-1"), {"mesh": {"data": -1}}),
        (("--name", "mine"), {"name": "mine"}),
    ],
)
def test_keys_of_the_recipe_are_changed(recipe, started, words, changes):
    path = "produce" if "task" in changes else recipe  # a recipe with a sampler
    assert cli.main(["train", path, *words]) == 0
    expected = load_recipe(path)
    expected = _changed(expected, changes)
    assert started[0][0] == expected
    assert started[0][1] == f"runs/{expected.name}"


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (("wrap", "True", "False"), {"wrap": (True, False)}),
        (("guidance-scale=-1.5",), {"guidance_scale": -1.5}),
        (("guidance-scale", "-1.5"), {"guidance_scale": -1.5}),
    ],
)
def test_keys_of_the_sampler_are_changed(started, words, changes):
    assert cli.main(["train", "produce", f"--task.model.sampler.{words[0]}", *words[1:]]) == 0
    assert started[0][0] == _changed(
        load_recipe("produce"), {"task": {"model": {"sampler": changes}}}
    )


def test_flags_of_train_itself_stand_anywhere(recipe, started):
    for words in (
        ["--out", "x", "--train.steps", "3"],
        ["--train.steps=3", "--resume", "--out=x"],
        ["--fresh", "--train.steps", "3", "--out", "x"],
    ):
        assert cli.main(["train", recipe, *words]) == 0
        config, out, fresh = started[-1]
        assert (config.train.steps, out, fresh) == (3, "x", "--fresh" in words)


def test_a_file_that_is_not_a_recipe_is_refused(tmp_path, refused):
    (tmp_path / "empty.py").write_text("")
    assert "defines no get_config()" in refused("train", str(tmp_path / "empty.py"))
    (tmp_path / "notes.txt").write_text("")
    assert "is not a recipe" in refused("train", str(tmp_path / "notes.txt"))
    assert "There is no recipe" in refused("train", str(tmp_path))


def test_an_error_in_a_recipe_is_said_with_its_line(tmp_path, refused):
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    said = refused("train", str(tmp_path / "broken.py"))
    assert "line 2" in said
    assert "ZeroDivisionError" in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_export_writes_what_load_takes(tiny_bundle, tmp_path, capsys, dtype):
    run, out = str(tmp_path / "run"), str(tmp_path / "out" / "model")
    write_bundle(run, tiny_bundle, "float32")
    assert cli.main(["export", run, out, "--dtype", dtype]) == 0
    assert out in capsys.readouterr().out
    exported = load_bundle(out)
    assert exported.spec == tiny_bundle.spec
    rounded = jax.tree.map(
        lambda x: np.asarray(jax.numpy.asarray(x).astype(dtype).astype("float32")),
        tiny_bundle.params,
    )
    jax.tree.map(np.testing.assert_array_equal, exported.params, rounded)


def test_export_replaces_only_files_of_an_export(tmp_path, refused):
    card = tmp_path / "card" / "README.md"
    card.parent.mkdir()
    card.write_text("# My notes\n")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for folder, holds in (("card", "README.md that no export wrote"), ("run", "holds a run")):
        assert holds in refused("export", "shipped:produce", str(tmp_path / folder))
    assert card.read_text() == "# My notes\n"
    assert len(list(tmp_path.rglob("*"))) == 4


@pytest.mark.parametrize("name", ["config.json", "model_index.json", "model.safetensors"])
def test_export_replaces_no_file_of_another_model(tmp_path, refused, name):
    (tmp_path / name).write_text("mine")
    said = refused("export", "shipped:produce_clip", str(tmp_path))
    assert f"a {name} that no export wrote" in said
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_an_export_in_another_type_keeps_counters():
    cast = _cast_to("float16")
    assert cast(np.array(200_000, np.int32)) == 200_000
    assert cast(np.ones(2, np.float32)).dtype == np.float16


def test_an_export_leaves_nothing_of_the_one_before(tmp_path, tiny_bundle, capsys):
    run, folder, fresh = tmp_path / "run", tmp_path / "folder", tmp_path / "fresh"
    write_bundle(run, tiny_bundle)
    for name in ("model_index.json", "ema.json", "evaluation.json", "base.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "tokenizers" / "old").mkdir(parents=True)
    (folder / "README.md").write_text("library_name: jaxdiff\n")
    for out in (folder, fresh):
        assert cli.main(["export", str(run), str(out)]) == 0
    found, expected = (
        {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
        for out in (folder, fresh)
    )
    assert found == expected
    assert not (folder / "tokenizers" / "old").exists()


def test_a_user_error_of_a_command_is_one_line(refused, monkeypatch):
    def fail(*_, **__):
        raise UserError("It is full: empty it.")

    monkeypatch.setattr(train, "run_recipe", fail)
    assert refused("train") == "jaxdiff: It is full: empty it.\n"


@pytest.mark.parametrize("name", ["cuda", "there_is_none"])
def test_a_platform_that_is_not_here_is_one_line(name):
    words = [sys.executable, "-m", "jaxdiff", "sample", "a pea", "--num-steps", "1"]
    environment = {**os.environ, "JAX_PLATFORMS": name}
    run = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert run.stderr.startswith(f"jaxdiff: JAX_PLATFORMS is {name!r}: ")
    assert run.stderr.count("\n") == 1


def test_an_unreachable_bucket_is_reported(refused, monkeypatch):
    words = ("sample", "a pea", "--out", "gs://bucket/images")
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    assert "pip install -e '.[gcs]'" in refused(*words)

    def forbid(_):
        raise RuntimeError("Anonymous caller does not have access\nto the bucket")

    monkeypatch.setattr(files, "find_spec", lambda name: name)
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", forbid)
    error = refused(*words[:2], "--out=gs://bucket/images")
    assert "gs://bucket/images cannot be reached (Anonymous caller does not have access)" in error


def test_quiet_prints_nothing_and_verbose_logs_compilation(monkeypatch, recipe, capsys):
    logs = []

    def run(*_, **__):
        print("step 1")
        logs.append(jax.config.jax_log_compiles)
        return Result({}, None, {}, {}, finished=True)

    monkeypatch.setattr(train, "run_recipe", run)
    for flags, printed in (("-q",), ""), ((), "step 1\n"), (("-v",), "step 1\n"):
        assert cli.main(["train", recipe, *flags]) == 0
        assert capsys.readouterr().out == printed
    assert logs == [False, False, True]
    assert not jax.config.jax_log_compiles


@pytest.mark.parametrize(
    "data",
    [
        "'''\xe9'''\ndef get_config(): pass\n".encode("latin-1"),
        "def get_config(): pass\n".encode("utf-16"),
        b"def get_config(): pass\0\n",
        b"def get_config(: pass\n",
        b"x = " + b"(" * 5000,
    ],
)
def test_a_recipe_that_is_not_python_is_refused(tmp_path, refused, data):
    (tmp_path / "a.py").write_bytes(data)
    assert "is not Python in UTF-8" in refused("train", str(tmp_path / "a.py"))


@pytest.mark.parametrize("text", [os.fsdecode(b"caf\xe9"), "a\0b"])
@pytest.mark.parametrize(
    "words",
    [
        *[(name, "{}") for name in COMMANDS],
        *[(name, "--{}", "1") for name in COMMANDS],
        ("{}",),
        ("recipes", "--plugin", "{}"),
        ("train", "--name", "{}"),
        ("train", "--out", "{}"),
        ("train", "--task.objective", "{}"),
        ("prepare", "produce.py", "{}"),
        ("evaluate", "shipped:produce", "--recipe", "{}"),
        ("export", "shipped:produce", "out", "--format", "{}"),
        ("explore", "shipped:produce", "--x", "{}"),
        ("plan", "--topology", "{}"),
        ("plan", "--topology", "cpu:8", "--mesh", "{}"),
        ("bench", "compare", "{}", "{}"),
        ("bench", "checkpoint", "--folder", "{}", "--repeats", "1"),
    ],
)
def test_arguments_that_are_no_text_are_one_line(refused, started, words, text):
    error = refused(*[word.replace("{}", text) for word in words])
    assert error.startswith("jaxdiff: ")
    assert error.count("\n") == 1
    assert not started


@pytest.mark.parametrize("words", [("{}",), ("train", "{}"), ("train", "--{}"), ("export", "{}")])
def test_control_characters_of_arguments_are_shown_escaped(refused, words):
    error = refused(*[word.replace("{}", "\x1b[31m\n") for word in words], "out")
    assert r"\x1b[31m" in error
    assert "\x1b" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("address", ["http://x", "x://y", "a/b.://png", "s3://bucket/x"])
@pytest.mark.parametrize(
    "words",
    [
        ("sample", "a pea", "--model"),
        ("sample", "a pea", "--out"),
        ("sample", "--prompts"),
        ("sample", "a pea", "--lora"),
        ("evaluate",),
        ("export", "shipped:produce"),
        ("train", "--out"),
        ("prepare",),
    ],
)
def test_addresses_that_no_command_reads_are_refused(words, address, refused):
    message = f"jaxdiff: {address} is an address that jaxdiff does not read or write: expected"
    assert refused(*words, address).startswith(message)
