import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from jaxdiff.cli import main as cli
from jaxdiff.pretrained.lora_names import layers_of
from tests.fuzz.harness import (
    PROMPT_FILES,
    SpoiltFolder,
    Stopwatch,
    counts,
    guarded,
    mutations,
)

WORDS = [
    *("", " ", "-", "--", "---", "=", "-1", "0", "1", "2.5", "nan", "inf", "1e999", "9" * 400),
    *("a pea", "(a pea:1.2)", "caf\udce9", "a\0b", "\u2028", "x" * 300, "[" * 2000, "豆"),
    *(".", "..", "/", "/dev/null", "/dev/full/x", "~", "missing", "gs:/", "http://x", "shipped:x"),
    *("--help", "--help-all", "--version", "-q", "-v", "--again", "--steps", "--cfg-scale"),
    *("--prompts", "--seed", "--size", "--solver", "--guidance-scale", "--strength", "--mask"),
    *("--init-image", "--negative-prompt", "--lora", "--embedding", "--format", "--num-images"),
    *("--train.steps", "--optimizer.learning-rate", "--data.source.path", "--mesh.fsdp"),
    *("--samples", "--json", "--dtype", "--shards", "--workers", "--host", "--hosts", "--plugin"),
    *("64x64", "16:9", "0.2-1", "None", "True", "int8", "png", "compare", "produce", "csv"),
]
FIRST = {
    "sample": ["--num-steps", "1"],
    "train": ["missing"],
    "prepare": ["missing", "out"],
    "evaluate": ["missing"],
    "export": ["missing"],
    "explore": ["missing"],
    "plan": ["missing"],
    "bench": ["compare"],
    "recipes": [],
    "completion": [],
    "env": [],
    "": [],
}


@pytest.mark.parametrize("command", FIRST)
@counts(10, 2000)
def test_command_lines(command, count, folder, models, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    first = FIRST[command]
    if command == "sample":
        first = ["--model", str(models["exported"]), "--out", "out", *first]
    rng = random.Random(command)
    with guarded(folder, processes=command == "env"):  # which asks git for the commit
        for _ in range(count):
            _runs([command, *first, *rng.choices(WORDS, k=rng.randint(0, 4))], capsys)


@counts(8, 2000)
def test_sampling_from_spoilt_prompt_files(count, folder, models, capsys):
    rng = random.Random(0)
    with guarded(folder):
        for data in mutations(list(PROMPT_FILES.values()), count):
            kind = rng.choice(list(PROMPT_FILES))
            (folder / f"p.{kind}").write_bytes(data)
            _runs(_sample(models["exported"], folder, "--prompts", folder / f"p.{kind}"), capsys)
            shutil.rmtree(folder / "out", ignore_errors=True)


@counts(3, 2000)
def test_sampling_with_spoilt_additions(count, folder, models, unet_spec, capsys):
    """A LoRA with the config of PEFT beside it, and an embedding."""
    layer, at = next((x, at) for x, at in layers_of(unet_spec).items() if x.endswith("to_q"))
    inputs, outputs = at.shapes["kernel"]
    pair = {"A": np.ones((2, inputs), np.float32), "B": np.ones((outputs, 2), np.float32)}
    name = f"base_model.model.{layer.partition('.')[2]}"
    weights = save({f"{name}.lora_{x}.weight": value for x, value in pair.items()})
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": [layer.split(".")[-1]],
    }
    word = save({"<w>": np.ones((2, 8), np.float32)})
    files = {
        "lora/adapter_model.safetensors": weights,
        "lora/adapter_config.json": json.dumps(config).encode(),
        "w.safetensors": word,
    }
    for file, data in files.items():
        (folder / "model" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "model" / file).write_bytes(data)
    additions = SpoiltFolder(folder / "model")
    assert cli.main(list(map(str, _sample(models["diffusers"], folder, "a pea")))) == 0  # compiles
    with guarded(folder):
        for _ in range(count):
            with additions.spoilt():
                for flag, file in (("--lora", "lora"), ("--embedding", "w.safetensors")):
                    path = additions.path / file
                    _runs(_sample(models["diffusers"], folder, "a <w>", flag, path), capsys)
            shutil.rmtree(folder / "out", ignore_errors=True)


@pytest.mark.parametrize("kind", ["exported", "diffusers", "run"])
@counts(5, 2000)
def test_exporting_spoilt_folders(kind, count, folder, models, capsys):
    model = SpoiltFolder(folder / "model", models[kind])
    rng = random.Random(0)
    with guarded(folder):
        for _ in range(count):
            kinds = ("jaxdiff", "diffusers", "lora", "embedding")
            with model.spoilt():
                words = ["export", model.path, folder / "out", "--format", rng.choice(kinds)]
                _runs(words, capsys)
            shutil.rmtree(folder / "out", ignore_errors=True)


@counts(5, 2000)
def test_sampling_from_spoilt_folders(count, folder, models, capsys):
    model = SpoiltFolder(folder / "model", models["exported"])
    with guarded(folder):
        for _ in range(count):
            with model.spoilt():
                _runs(_sample(model.path, folder, "a pea"), capsys)
            shutil.rmtree(folder / "out", ignore_errors=True)


def _sample(model: Path, folder: Path, *words: object) -> list[object]:
    return ["sample", "--model", model, "--out", folder / "out", "--num-steps", 1, *words]


def _runs(words: list, capsys) -> None:
    """Run a command; fail on anything but success and one sentence."""
    watch = Stopwatch()
    status = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    assert status in (0, 1, 2), words
    assert "Traceback" not in said.err, (words, said.err)
    if status == 2:
        *_, last = said.err.splitlines()  # after warnings
        assert last.startswith("jaxdiff: "), (words, said.err)
    watch.check(words)
