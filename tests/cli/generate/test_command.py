import io
import json
import os
import re
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

from jaxdiff.cli import main as cli
from jaxdiff.cli.generate import command
from jaxdiff.cli.generate.options import GROUPS, SampleFlags, file_and_scale, prompt_warnings
from jaxdiff.cli.parsing import _flags
from jaxdiff.errors import UserError
from jaxdiff.io import terminal
from jaxdiff.io.image_files import read_image_text
from jaxdiff.pipelines import edit
from jaxdiff.pipelines.load import load
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.program import compiled_sampler
from tests.pretrained.families import random_bundle

PEA, TOMATO = "a small red pea", "a green tomato with a stem"


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ("style.safetensors", ("style.safetensors", 1.0)),
        ("styles/mine:0.8", ("styles/mine", 0.8)),
        ("gs://bucket/style", ("gs://bucket/style", 1.0)),
        ("gs://bucket/style:-0.5", ("gs://bucket/style", -0.5)),
    ],
)
def test_a_lora_is_a_file_and_perhaps_a_scale(lora, expected):
    assert file_and_scale(lora) == expected


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_the_scale_of_a_lora_is_finite(scale):
    with pytest.raises(UserError, match=f"--lora style:{scale}: .*expected a finite number"):
        file_and_scale(f"style:{scale}")


def test_a_lora_may_have_a_number_after_a_colon_in_its_name(tmp_path):
    path = tmp_path / "style:2"
    path.mkdir()
    assert file_and_scale(str(path)) == (str(path), 1.0)
    assert file_and_scale(f"{path}:0.5") == (str(path), 0.5)


def test_it_writes_a_png_for_each_prompt_and_a_grid(sample, model, tmp_path, capsys):
    assert sample(PEA, TOMATO, "--seed", "7") == 0
    out = tmp_path / "out"
    names = ["0000-a-small-red-pea.png", "0001-a-green-tomato-with-a-stem.png", "grid.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    images = load(model)([PEA, TOMATO], seeds=[7, 7])
    for name, image in zip(names, images, strict=False):
        np.testing.assert_array_equal(np.asarray(Image.open(out / name)), image)
    printed = capsys.readouterr().out
    assert all(str(out / name) in printed for name in names)


def test_the_grid_of_many_or_large_images_is_not_huge(tmp_path):
    small, large = np.zeros((500, 8, 8, 3), np.uint8), np.zeros((2, 64, 512, 3), np.uint8)
    command._save_grid(epath.Path(tmp_path), small, [PEA] * 500)
    assert Image.open(tmp_path / "grid.png").size == (20 * (2 * 8 + 2) + 2,) * 2
    command._save_grid(epath.Path(tmp_path), large, [PEA] * 2)
    assert Image.open(tmp_path / "grid.png").size[0] == 2 * (512 + 2) + 2


def test_the_text_chunks_state_the_settings_of_an_image(sample, model, tmp_path):
    words = ("--num-steps", "2", "--guidance-scale", "1.5", "--negative-prompt", "red")
    assert sample(PEA, "--seed", "4", "--num-images", "2", *words) == 0
    texts = [read_image_text(p) for p in sorted((tmp_path / "out").glob("0*.png"))]
    assert [text["prompt"] for text in texts] == [PEA, PEA]
    assert [text["seed"] for text in texts] == ["4", "5"]
    assert json.loads(texts[0]["settings"]) == {
        "negative_prompt": "red",
        "num_steps": 2,
        "guidance_scale": 1.5,
        "solver": "ddim",
        "size": "32x32",
    }
    assert texts[0]["model"] == "tiny"
    assert texts[0]["model_fingerprint"] == load(model).fingerprint


def test_the_pipeline_reproduces_the_image_from_its_text_chunks(sample, model, tmp_path):
    assert sample(TOMATO, "--seed", "11", "--num-steps", "2") == 0
    path = next((tmp_path / "out").glob("0*.png"))
    text = read_image_text(path)
    settings = json.loads(text["settings"])
    again = load(model)(
        [text["prompt"]],
        seeds=[int(text["seed"])],
        num_steps=settings["num_steps"],
        guidance_scale=settings["guidance_scale"],
    )
    np.testing.assert_array_equal(np.asarray(Image.open(path)), again[0])


@pytest.mark.parametrize(
    "prompt",
    ["../../x", "/etc/passwd", "..", "a\\b", "茄子 🍆", "éclair", "", "x" * 500, "a\nb", "-x"],
)
def test_no_prompt_leads_out_of_the_folder(sample, tmp_path, prompt):
    assert sample("--num-steps", "1", "--", prompt) == 0
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.parent for p in written} == {tmp_path / "out"}
    image = next(p for p in written if p.name != "grid.png")
    assert re.fullmatch(r"0000-[a-z0-9-]{1,60}\.png", image.name)
    assert read_image_text(image)["prompt"] == prompt


def test_a_strip_is_written_if_asked_for(sample, tmp_path):
    assert sample(PEA, "--strip", "3") == 0
    width, height = Image.open(tmp_path / "out" / "strip.png").size
    assert width > 3 * 32
    assert height < 2 * 32


def test_an_interpolation_writes_frames_a_strip_and_an_animation(sample, model, tmp_path):
    assert sample(PEA, TOMATO, "--interpolate", "4", "--seed", "3", "--mix-seed", "8") == 0
    out = tmp_path / "out"
    frames = edit.interpolate(load(model), (PEA, TOMATO), 4, seeds=(3, 8))
    for i, frame in enumerate(frames):
        image = np.asarray(Image.open(out / f"000{i}-a-small-red-pea.png"))
        # Noise of two seeds at a time is rounded differently from that of one.
        np.testing.assert_allclose(image.astype(int), frame, atol=1)
    images = [np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))]
    assert Image.open(out / "interpolation.png").width > 4 * 32
    animation = Image.open(out / "interpolation.webp")
    assert animation.n_frames == 6  # forward and backward
    for i, frame in enumerate(images):
        animation.seek(i)
        np.testing.assert_array_equal(np.asarray(animation.convert("RGB")), frame)


def test_a_preview_is_written_and_changes_no_file(sample, tmp_path):
    out = tmp_path / "out"
    assert sample(PEA, "--num-steps", "4") == 0
    file = out / "0000-a-small-red-pea.png"
    expected = file.read_bytes()
    assert sample(PEA, "--num-steps", "4", "--preview", "2") == 0
    assert file.read_bytes() == expected
    assert Image.open(out / "preview.png").size == (36, 36)


def test_a_prompt_that_is_too_long_is_reported(sample, capsys):
    assert sample("pea " * 30, PEA) == 0
    printed = capsys.readouterr().err
    assert "longer than the 16 tokens" in printed
    assert "its end is cut off" in printed
    assert printed.count("longer than") == 1


def test_a_scale_below_1_is_reported_in_one_line(sample, capsys, tmp_path):
    assert sample(PEA, "--guidance-scale", "0") == 0
    assert capsys.readouterr().err.splitlines() == [
        "guidance_scale is 0: below 1 it steers towards the negative prompt; 1 is unguided."
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": PEA, "guidance_scale": 0.5}))
    assert sample("--prompts", file) == 0
    assert capsys.readouterr().err.splitlines() == [
        "guidance_scale is 0.5: below 1 it steers towards the negative prompt; 1 is unguided."
    ]
    assert sample(PEA, "--guidance-scale", "0", "-q") == 0
    assert not capsys.readouterr().err


def test_words_that_the_model_never_saw_are_reported(sample, capsys):
    assert sample("a red snow globe", PEA) == 0
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert "'a red snow globe'" in line
    assert "contains: 'snow', 'globe';" in line
    assert sample("--words") == 0
    assert capsys.readouterr().out.split() == sorted(
        {*["a", "small", "red", "pea"], *["a", "green", "tomato", "with", "a", "stem"]}
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "no prompt"),
        ((PEA, "--size", "64"), "--size is '64': expected WIDTHxHEIGHT"),
        ((PEA, "--size", "32x33"), "multiples of 8"),
        ((PEA, "--size", "0x0"), "multiples of 8"),
        ((PEA, "--seed", "-1"), "--seed is -1"),
        ((PEA, "--seed", str(2**32)), "--seed is 4294967296"),
        ((PEA, "--seed", str(2**32 - 1), "--num-images", "2"), "from 0 to 4294967294"),
        ((PEA, "--num-images", "0"), "--num-images is 0"),
        ((PEA, "--num-steps", "0"), "--num-steps is 0: expected a whole number from 1"),
        ((PEA, "--num-steps", "-1"), "--num-steps is -1: expected a whole number from 1"),
        ((PEA, "--num-steps", "1000000000"), "--num-steps is 1000000000: expected a whole number"),
        ((PEA, "--guidance-scale", "nan"), "--guidance-scale is nan: expected a number"),
        ((PEA, "--guidance-scale", "1e39"), "--guidance-scale is 1e+39: expected a number"),
        ((PEA, "--strip", "-1"), "--strip is -1"),
        ((PEA, "--solver", "ddmi"), "ddim"),
        ((PEA, "--mask", "x.png"), "has no effect without --init-image"),
        ((PEA, "--strength", "0.5"), "has no effect without --init-image"),
        ((PEA, "--init-image", "missing.png"), "missing.png cannot be read"),
        ((PEA, "--strength", "2", "--init-image", "x.png"), "--strength is 2.0: expected a number"),
        ((PEA, "--image", "x.png"), "did you mean --init-image?"),
        ((PEA, "--preview", "-1"), "--preview is -1"),
        ((PEA, "--preview-decoder", "x"), "--preview-decoder has no effect without --preview"),
        ((PEA, "--preview", "2", "--preview-decoder", "missing"), "missing"),
        ((PEA, "--interpolate", "4"), "--interpolate 4 with 1 prompts"),
        ((PEA, TOMATO, "--interpolate", "1"), "at least 2 images"),
        ((PEA, TOMATO, "--interpolate", "3", "--mix", "0.5"), "exclude each other"),
        (
            (PEA, TOMATO, "--interpolate", "3", "--best-of", "2"),
            "--interpolate and --best-of exclude",
        ),
        ((PEA, "--strip", "3", "--variation", "0.5"), "--strip and --variation exclude"),
        ((PEA, "--seamless", "--vae-mode", "tiling"), "--seamless and --vae-mode tiling exclude"),
        ((PEA, "--vae-mode", "tiles"), "expected one of full, slicing, tiling"),
        ((PEA, "--guide-model", "missing"), "missing"),
        ((PEA, "--guide-scale", "2"), "give --guide-model"),
        (
            (PEA, "--clip-cutouts", "2"),
            "--clip-cutouts has no effect without --clip-scale: give --clip-scale",
        ),
        ((PEA, "--guidance-interval", "0.9-0.1"), "--guidance-interval is '0.9-0.1': expected LOW"),
        ((PEA, "--apg", "2"), "--apg is 2.0: expected a number from 0 to 1"),
        ((PEA, "--cfg-zero-star", "-1"), "--cfg-zero-star is -1: expected a whole number"),
        ((PEA, "--best-of", "0"), "--best-of is 0: expected a whole number"),
        ((PEA, "--best-of", "2", "--clip-model", "missing"), "missing"),
        ((PEA, "--size", "1:100"), "expected one nearer to 1:1"),
        ((PEA, "--format", "gif"), "gif"),
        ((PEA, "--clip-scale", "1", "--clip-model", "missing"), "missing"),
        ((PEA, "--sed", "1"), "did you mean --seed?"),
        ((PEA, "--negative_promt=x"), "did you mean --negative-prompt?"),
    ],
)
def test_a_user_error_has_exit_status_2(sample, capsys, words, expected):
    assert sample(*words) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert cli.main(["sample", PEA, "--model", str(tmp_path)]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_refused(model, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    out = str(tmp_path / "file")
    assert cli.main(["sample", PEA, "--model", str(model), "--out", out]) == 2
    assert "cannot be written to as a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_help_fits_one_screen_and_the_long_help_has_every_flag(capsys):
    assert cli.main(["sample", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert cli.main(["sample", PEA, "--help-all"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    shown = set(re.findall(r"^  (?:-[a-z], )?(--[a-z-]+)", text, re.MULTILINE))
    assert shown == {flag.split(".")[0] for flag in _flags(SampleFlags)} | {"--hosts"}
    headings = [line for line in text.splitlines() if line.endswith(":")]
    assert headings == [f"{group}:" for group in GROUPS]


def test_quiet_prints_paths_alone(sample, tmp_path, capfd):
    out = tmp_path / "out"
    assert sample("a red snow globe", PEA, "-q") == 0
    names = ("0000-a-red-snow-globe.png", "0001-a-small-red-pea.png", "grid.png")
    assert capfd.readouterr() == ("".join(f"{out / name}\n" for name in names), "")
    rows = tmp_path / "rows.txt"
    rows.write_text(f"a red snow globe\n{PEA}\n")
    assert sample("--prompts", rows, "--quiet") == 0
    assert capfd.readouterr() == (f"{out / 'manifest.jsonl'}\n", "")


def test_verbose_logs_what_is_compiled(sample, capfd, caplog):
    compiled_sampler.cache_clear()
    assert sample(PEA, "-v") == 0
    assert any("Finished XLA compilation" in line for line in caplog.messages)
    caplog.clear()
    compiled_sampler.cache_clear()
    assert sample(PEA) == 0
    assert caplog.messages == []
    assert capfd.readouterr().err == ""
    assert sample(PEA, "-q", "-v") == 2
    assert "--quiet and --verbose exclude each other" in capfd.readouterr().err


def test_more_images_than_the_devices_take_at_once_are_those_of_one_call(sample, model, tmp_path):
    assert sample(PEA, "--num-images", "5", "--seed", "3") == 0
    images = load(model)([PEA] * 5, seeds=range(3, 8))
    for i, image in enumerate(images):
        path = tmp_path / "out" / f"000{i}-a-small-red-pea.png"
        np.testing.assert_array_equal(np.asarray(Image.open(path)), image)


@pytest.mark.parametrize("out", ["closed", "full", "ascii"])
def test_output_that_cannot_be_written_loses_no_image(sample, tmp_path, monkeypatch, out):
    if out == "ascii":
        stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    elif out == "full":
        stream = open("/dev/full", "w")  # noqa: SIM115
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    folder = tmp_path / "grün\x1b\n"
    assert sample(PEA, TOMATO, "--out", folder) == 0
    assert len(list(folder.glob("000*.png"))) == 2
    (tmp_path / "a.txt").write_text(f"{PEA}\n{TOMATO}\n")
    rows = tmp_path / "rows"
    assert sample("--prompts", tmp_path / "a.txt", "--grid", "--out", rows, "--verbose") == 0
    assert len((rows / "manifest.jsonl").read_text().splitlines()) == 2
    if out == "ascii":
        stream.flush()
        shown = stream.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]
        assert rf"{tmp_path}/gr\xfcn\x1b\n/0000-a-small-red-pea.png" in shown
    else:
        terminal._discard(stream)
        stream.close()


@pytest.mark.parametrize("text", [os.fsdecode(b"caf\xe9"), "a\0b", "pea " * 40_000])
@pytest.mark.parametrize(
    "words",
    [
        ("{}",),
        (PEA, "{}"),
        ("--negative-prompt", "{}", PEA),
        (PEA, "--mix-prompt", "{}"),
        (PEA, "--init-image", "{}"),
        (PEA, "--solver", "{}"),
        (PEA, "--{}", "1"),
        ("--again", "{}"),
        ("--prompts", "{}"),
        (PEA, "--clip-model", "{}", "--best-of", "2"),
        ("--lora", "{}", PEA),
        ("--lora", "{}.safetensors", PEA),
        ("--embedding", "{}.safetensors", PEA),
    ],
)
def test_arguments_that_are_no_text_are_one_sentence(refused, model, tmp_path, text, words):
    words = [word.replace("{}", text) for word in words]
    error = refused("sample", "--model", str(model), "--out", str(tmp_path / "o"), *words)
    assert error.startswith("jaxdiff: ")
    assert error.count("\n") == 1


def test_names_that_are_not_utf_8_are_read_and_written(sample, tmp_path, capsys):
    folder = os.fsdecode(bytes(tmp_path / "out") + b"\xe9")
    prompts = os.fsdecode(bytes(tmp_path / "p") + b"\xe9.txt")
    epath.Path(prompts).write_text(f"{PEA}\n")
    for generated in (1, 0):
        assert sample("--prompts", prompts, "--out", folder) == 0
        assert f"{generated} image" in capsys.readouterr().out
    (line,) = (epath.Path(folder) / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line)["prompts"] == r"p\xe9.txt"
    image = os.fsdecode(bytes(tmp_path / "again") + b"\xe9.png")
    (epath.Path(folder) / "0000-a-small-red-pea.png").rename(image)
    assert sample("--again", image, "--out", folder) == 0
    assert r"out\xe9/again\xe9-again.png" in capsys.readouterr().out


def test_a_long_prompt_is_said_with_the_encoders_that_cut_it_off(tmp_path):
    pipe = Pipeline(random_bundle("FLUX.1 schnell", tmp_path))
    lengths = {name: one.length for name, one in pipe.spec.conditioner.encoders.items()}
    assert lengths == {"text": 77, "text_2": 256}
    assert prompt_warnings(pipe, "pea " * 20, "The prompt", set()) == []
    (one,) = prompt_warnings(pipe, "pea " * 80, "The prompt", set())
    assert one == "The prompt is longer than the 77 tokens of text: its end is cut off there."
    (both,) = prompt_warnings(pipe, "pea " * 300, "The prompt", set())
    assert "the 77 tokens of text and the 256 tokens of text_2: its end" in both
