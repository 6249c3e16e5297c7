"""README and docs: command lines parse, Python runs, links lead somewhere, the site builds."""

import contextlib
import dataclasses
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.cli import main as cli
from jaxdiff.config.recipe_files import recipe_names
from jaxdiff.config.serialization import to_json
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.io import files
from jaxdiff.pipelines import lora, textual_inversion
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.training.recipe import Config, config_from_json, load_recipe
from jaxdiff.training.run import run_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = SimpleNamespace(stopped_by=None)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
COMMAND = re.compile(
    rf"(?:^|(?<=[\s']))(python (?:train|sample)\.py|jaxdiff (?:{'|'.join(cli.COMMANDS)}))\b"
)
PLACEHOLDER = re.compile(r"\.\.\.|\b(?:RUN|MODEL|PROMPT|NAME|KEY|VALUE|MODULE|RECIPE|DIR|N)\b")


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def commands(page: Path) -> list[str]:
    """All command lines of blocks, and those between backticks that have arguments."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    inline = INLINE.findall(FENCE.sub("", page.read_text()))
    inline = [code for code in inline if not PLACEHOLDER.search(code)]
    found = []
    for is_block, code in [*((True, x) for x in lines), *((False, x) for x in inline)]:
        for part in re.split(r"&&|[;&]", code):
            match = COMMAND.search(part)
            if match is None or (not is_block and not part[match.end() :].strip()):
                continue
            command = part[match.start() :].strip()
            found.append(command.rstrip("'") if command.count("'") % 2 else command)
    return list(dict.fromkeys(found))


def arguments(command: str) -> list[str]:
    """Return what `jaxdiff.cli.main.main` gets for it."""
    words = shlex.split(command, comments=True)
    if words[0] == "jaxdiff":
        return words[1:]
    assert (ROOT / words[1]).is_file()
    return [Path(words[1]).stem, *words[2:]]


ALL = [pytest.param(c, id=f"{page.stem}: {c}") for page in PAGES for c in commands(page)]


def recipe_of_page(page: Path) -> str:
    return next(code for code in blocks(page, "python") if "def get_config" in code)


def test_pages_show_each_command():
    shown = {arguments(c.values[0])[0] for c in ALL}
    assert shown >= {
        "train",
        "sample",
        "evaluate",
        "ema",
        "export",
        "prepare",
        "explore",
        "plan",
        "bench",
        "compile",
    }


@pytest.mark.parametrize("command", ALL)
def test_commands_are_understood(command, monkeypatch, tmp_path, capsys):
    ran = []
    for name in (
        "train.run_recipe",
        "train.describe_recipe",
        "sample.sample_images",
        "evaluate.evaluate_model",
        "ema.average_model",
        "evaluate.score_images",
        "evaluate.compare_command",
        "explore.explore_data",
        "export.export_model",
        "compile.compile_model",
        "bench.run_benchmark",
        "bench.bench_compare",
    ):
        monkeypatch.setattr(f"jaxdiff.cli.{name}", lambda *_, n=name, **__: ran.append(n) or RUN)
    for module in ("train", "sample", "evaluate"):
        monkeypatch.setattr(f"jaxdiff.cli.{module}.join_hosts", lambda *_: contextlib.nullcontext())
    for name in ("_plans", "_print"):
        monkeypatch.setattr(
            f"jaxdiff.cli.plan.{name}", lambda *_, n=name, **__: ran.append(n) or []
        )
    monkeypatch.setattr("jaxdiff.cli.prepare.source_at", lambda _: Produce())
    monkeypatch.setattr("jaxdiff.cli.prepare.write_records", lambda *_: ran.append("prepare"))
    monkeypatch.setattr(files, "check_reachable", lambda _: None)
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(recipe_of_page(ROOT / "README.md"))
    assert cli.main(arguments(command)) == 0, capsys.readouterr().err
    prints = arguments(command)[0] == "recipes" or "--help" in command
    assert prints or ran


SLOW = ("editing",)  # compiles a program for nearly each line
WITH_PYTHON = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else [])
    for page in PAGES
    if blocks(page, "python")
]


def run_blocks(page: Path) -> dict:
    """Run the Python blocks of a page in order, in one namespace."""
    names: dict = {"__name__": f"docs_{page.stem}"}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name} block {number}", "exec"), names)
    return names


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs_with_a_tiny_model(page, pipeline, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jaxdiff, "load", lambda *_, **__: pipeline)
    monkeypatch.setattr(Pipeline, "with_autoencoder", lambda self, _: self)
    for module, name in ((lora, "apply_lora"), (textual_inversion, "apply_embedding")):
        monkeypatch.setattr(module, name, lambda pipe, *_, **__: pipe)
    names = run_blocks(page)
    configs = [value for value in names.values() if isinstance(value, Config)]
    if "get_config" in names:
        configs.append(names["get_config"]())
    for config in configs:
        assert config_from_json(to_json(config)) == config


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/editing.md"])
def test_python_runs_with_the_shipped_model(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_blocks(ROOT / name)


@pytest.mark.nightly
def test_the_recipe_of_the_readme_trains(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(8):
        Image.fromarray(np.full((80, 80, 3), 30 * i, np.uint8)).save(f"photos/{i}.png")
        Path(f"photos/{i}.txt").write_text("a photo of a cat")
    Path("mine.py").write_text(recipe_of_page(ROOT / "README.md"))
    config = load_recipe("mine.py")
    train = dataclasses.replace(config.train, steps=2, batch_size=8)
    run_recipe(dataclasses.replace(config, train=train), "run")
    assert Path("run/summary.json").exists()


@pytest.mark.nightly
def test_parts_of_a_page_train(tiny_recipe, pipeline, monkeypatch, tmp_path):
    monkeypatch.setattr(jaxdiff, "load", lambda *_, **__: pipeline)
    parts = run_blocks(ROOT / "docs/extending.md")
    config = tiny_recipe(steps=2)
    data = dataclasses.replace(config.data, source=parts["Gradients"]())
    task = dataclasses.replace(config.task, objective=parts["PlainX0"](), curriculum=None)
    assert run_recipe(dataclasses.replace(config, data=data, task=task), str(tmp_path)).finished


def test_the_page_of_recipes_has_all_of_them():
    path = ROOT / "docs/hooks.py"
    spec = importlib.util.spec_from_file_location("hooks", path)
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.on_page_markdown((ROOT / "docs/recipes.md").read_text())
    assert all(f"\n## {name}\n" in page for name in recipe_names())
    assert "\n    " not in re.sub(FENCE, "", page)  # code is fenced
    assert hooks.MARKER not in page


MEMBERS = re.compile(r"^::: (\S+)\n(?:    .*\n)*?      members: \[(.*)\]", re.MULTILINE)


@pytest.mark.parametrize("page", sorted((ROOT / "docs/api").glob("*.md")), ids=lambda p: p.stem)
def test_the_reference_names_what_there_is(page):
    for module, names in MEMBERS.findall(page.read_text()):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pictures_and_links_exist(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", FENCE.sub("", page.read_text()))
    missing = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    assert not missing


def test_no_text_installs_what_no_index_has():
    sources = (ROOT / "jaxdiff").rglob("*.py")
    texts = [*PAGES, ROOT / "CONTRIBUTING.md", *sources, *(ROOT / "configs").glob("*.py")]
    wrong = [p for p in texts if re.search(r"install\s+['\"]?jaxdiff\b", p.read_text())]
    assert not wrong
