"""950 of 1,000 rows render, the 50 invalid ones are reported, and ten kills change no file."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]
ROWS = 1000
KILLS = 10

INVALID = {
    '{"prompt": ""}': "prompt is empty",
    '{"prompt": "a pea", "seed": 3': "it is not valid JSON",
    '{"prompt": "a pea", "sed": 3}': "did you mean seed?",
    '{"prompt": "a pea", "num_steps": "ten"}': "num_steps is 'ten': expected a whole number",
    '{"prompt": "a pea", "size": "63x64"}': "multiples of",
    '{"prompt": "a pea", "seed": 4294967296}': "seed is 4294967296: expected a whole number",
    '{"prompt": "a pea", "init_image": "missing.png"}': "missing.png cannot be read",
    '{"prompt": "a pea", "init_image": "broken.png"}': "broken.png is not a readable image",
    '{"prompt": "a pea", "init_image": "a.png", "mask": "large.png"}': "The mask large.png is",
    '{"prompt": "a pea", "init_image": "../a.png"}': "leaves the folder",
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """The file, and the reason that is reported for each invalid line, counted from 1."""
    folder = tmp_path_factory.mktemp("prompts")
    rng = random.Random(0)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels).resize((128, 128)).save(folder / "large.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:300])
    kinds = ["pea", "tomato with a stem", "banana", "lemon", "carrot"]
    colours = ["red", "green", "yellow", "purple", "orange"]
    lines = [
        json.dumps(
            {
                "prompt": f"a {rng.choice(colours)} {rng.choice(kinds)}",
                "seed": rng.randrange(2**32),
                "num_steps": rng.choice([1, 2, 3]),
                "guidance_scale": rng.choice([1.0, 3.0]),
                "negative_prompt": rng.choice(["", "a stem"]),
            }
        )
        for _ in range(ROWS)
    ]
    places = rng.sample(range(ROWS), 5 * len(INVALID))
    reasons = {}
    for i, line in enumerate(places):
        text, reason = list(INVALID.items())[i % len(INVALID)]
        lines[line], reasons[line + 1] = text, reason
    path = folder / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path, reasons


def command(prompts, out):
    words = [sys.executable, ROOT / "sample.py", "--prompts", prompts, "--out", out]
    return [str(word) for word in words]


def environment(folder):
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    }


def contents(folder):
    """SHA-256 of all images, and the manifest without the seconds."""
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return files | {"manifest.jsonl": [line | {"seconds": 0} for line in lines]}


@pytest.mark.nightly
def test_all_valid_rows_render_and_ten_kills_change_nothing(prompts, tmp_path_factory):
    file, reasons = prompts
    folder = tmp_path_factory.mktemp("rendered")
    env, whole, killed = environment(folder), folder / "whole", folder / "killed"
    start = time.monotonic()
    run = subprocess.run(command(file, whole), env=env, capture_output=True, text=True)
    print(f"undisturbed: {time.monotonic() - start:.0f} s")
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("a.jsonl, line ")]
    assert len(errors) == len(reasons) == 50
    for line, reason in reasons.items():
        (error,) = [x for x in errors if x.startswith(f"a.jsonl, line {line}:")]
        assert reason in error
    assert "50 of 1000 rows of a.jsonl have no image" in run.stderr
    images = [p for p in whole.iterdir() if p.suffix == ".png"]
    assert len(images) == ROWS - len(reasons)

    rng, start = random.Random(1), time.monotonic()
    for kill in range(KILLS):
        wanted = rng.randint(kill * 85 + 5, (kill + 1) * 85)
        with subprocess.Popen(
            command(file, killed), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and len(list(killed.glob("0*.png"))) < wanted:
                time.sleep(0.01)
            assert process.poll() is None  # or nothing is left to kill
            process.send_signal(signal.SIGKILL)
    run = subprocess.run(command(file, killed), env=env, capture_output=True, text=True)
    print(f"killed {KILLS} times: {time.monotonic() - start:.0f} s")
    assert run.returncode == 1
    assert contents(killed) == contents(whole)
