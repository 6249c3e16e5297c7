import random

import pytest

from jaxdiff.cli import main as cli
from tests.fuzz.harness import counts, guarded

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
            words = [command, *first, *rng.choices(WORDS, k=rng.randint(0, 4))]
            status = cli.main(words)
            said = capsys.readouterr()
            assert status in (0, 1, 2), words
            assert "Traceback" not in said.err, (words, said.err)
            if status == 2:
                assert said.err.startswith("jaxdiff: "), (words, said.err)
