import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from jaxdiff.cli import main as cli
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.models.lora import Factors
from jaxdiff.pipelines.lora import attach
from jaxdiff.pipelines.textual_inversion import Word
from jaxdiff.pretrained.bundle import Bundle

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CLI = "jaxdiff.cli"
START = re.compile(r"^(python (train|sample)\.py|jaxdiff)\b")


def commands() -> list[str]:
    """Every train, sample or jaxdiff command line in a code block of the README."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    # A backslash joins lines; `&&` parts commands.
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    steps = (step.strip() for line in lines for step in line.split("&&"))
    return [step for step in steps if START.match(step)]


def arguments(command: str) -> list[str]:
    """What `jaxdiff.cli.main.main` gets for it, without comments and optional parts."""
    words = shlex.split(command.replace("[", "").replace("]", ""), comments=True)
    if words[0] == "jaxdiff":
        return words[1:]
    assert (ROOT / words[1]).is_file()
    return [Path(words[1]).stem, *words[2:]]


def test_the_readme_shows_how_to_train_and_to_sample():
    names = {arguments(command)[0] for command in commands()}
    assert {"train", "sample"} <= names


@pytest.fixture(scope="module")
def adapted(tiny_recipe) -> Bundle:
    """A model with one adapter, which every format can hold."""
    config = tiny_recipe()
    params = {"denoiser": {"patch": {"kernel": np.zeros((192, 32), np.float32)}}}
    pair = Factors(np.zeros((192, 1), np.float32), np.zeros((1, 32), np.float32))
    return attach(Bundle(config, params, {}, None), {"denoiser": {("patch",): pair}})


@pytest.mark.parametrize("command", commands() if README.is_file() else [])
def test_its_commands_are_understood(command, adapted, monkeypatch, capsys):
    ran, prepared = [], {"write_records": None, "source_at": Produce()}
    for name in (
        "train.run_recipe",
        "sample.draw",
        "evaluate.evaluate_folder",
        "explore.explore_data",
        "bench.run_benchmark",
        "bench.bench_compare",
    ):
        monkeypatch.setattr(f"{CLI}.{name}", lambda *args, name=name, **kwargs: ran.append(name))
    for name in ("write_records", "source_at"):
        monkeypatch.setattr(f"{CLI}.prepare.{name}", lambda *_, name=name: prepared[name])
    for name in ("_topology", "make_plan", "_print"):
        monkeypatch.setattr(f"{CLI}.plan.{name}", lambda *_, **__: None)
    writers = ("bundle", "diffusers", "lora", "embedding")
    writers = ("make_folder", *(f"write_{name}" for name in writers))
    for name in writers:
        monkeypatch.setattr(f"{CLI}.export.{name}", lambda *_, name=name, **__: Path(name))
    monkeypatch.setattr(f"{CLI}.export.read_bundle", lambda _: adapted)
    inversion = "jaxdiff.pipelines.textual_inversion"
    monkeypatch.setattr(f"{inversion}.word_of", lambda _: Word("<my-thing>", {}))
    monkeypatch.setattr(f"{inversion}.settled", lambda bundle: bundle)
    assert cli.main(arguments(command)) == 0, capsys.readouterr().err
    if arguments(command)[0] in ("train", "sample", "evaluate", "explore", "bench"):
        assert len(ran) == 1


def test_its_pictures_and_links_exist():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text())
    missing = [x for x in links if "://" not in x and not (ROOT / x).exists()]
    assert not missing
