import hashlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxdiff.cli.generate import batch_generate
from jaxdiff.distributed import multihost
from jaxdiff.io.image_files import read_image_text
from jaxdiff.pipelines import edit
from jaxdiff.pipelines.input_images import InitImage
from jaxdiff.pipelines.load import load
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.bundle import write_bundle
from jaxdiff.sampling.guidance.autoguidance import Autoguidance
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import Euler

PEA, TOMATO = "a small red pea", "a green tomato with a stem"


@pytest.fixture
def prompts(tmp_path):
    """`prompts({"prompt": "a pea"}, ...)` writes a file of prompts, and gives its path."""

    def write(*rows):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in rows))
        return path

    return write


@pytest.fixture
def calls(monkeypatch):
    """The prompts of each call of the pipeline."""
    made = []
    call = Pipeline.__call__

    def counted(self, prompts, **settings):
        made.append(list(prompts))
        return call(self, prompts, **settings)

    monkeypatch.setattr(Pipeline, "__call__", counted)
    return made


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def contents(folder):
    """All files by their name, the seconds in the manifest left out."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    lines = [line | {"seconds": 0} for line in manifest(folder)]
    return files | {"manifest.jsonl": lines}


def numbered(n, **more):
    return [{"prompt": f"{PEA} {i}", "seed": i, **more} for i in range(n)]


def test_every_row_has_its_settings_and_inherits_the_flags(sample, prompts, model, tmp_path):
    rows = [
        {"prompt": PEA, "seed": 3, "num_steps": 2},
        {"prompt": TOMATO, "name": "../My Tomato!", "guidance_scale": 4, "negative_prompt": "red"},
        {"prompt": PEA, "solver": "euler"},
    ]
    assert sample("--prompts", prompts(*rows), "--seed", 9, "--guidance-scale", "1.5") == 0
    out = tmp_path / "out"
    files = [
        "0000-a-small-red-pea.png",
        "my-tomato-a-green-tomato-with-a-stem.png",
        "0002-a-small-red-pea.png",
    ]
    assert sorted(p.name for p in out.iterdir()) == sorted([*files, "manifest.jsonl"])
    pipeline = load(model)
    expected = [
        pipeline([PEA], seeds=[3], num_steps=2, guidance_scale=1.5),
        pipeline([TOMATO], seeds=[9], guidance_scale=4.0, negative_prompt=["red"]),
        pipeline([PEA], seeds=[9], guidance_scale=1.5, sampler=Sampler(solver=Euler())),
    ]
    for file, image in zip(files, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(out / file)), image[0])
    lines = manifest(out)
    assert [line["file"] for line in lines] == files
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert [line["seed"] for line in lines] == [3, 9, 9]
    assert lines[1]["settings"] == {
        "negative_prompt": "red",
        "num_steps": 3,
        "guidance_scale": 4.0,
        "solver": "ddim",
        "size": "32x32",
    }
    for line in lines:
        data = (out / line["file"]).read_bytes()
        assert line["sha256"] == hashlib.sha256(data).hexdigest()
        assert line["seconds"] > 0
        assert json.loads(read_image_text(out / line["file"])["settings"]) == line["settings"]


def test_rows_of_one_kind_share_a_call(sample, prompts, calls):
    # Steps split calls but compile nothing; guidance, seeds and negative prompts do neither, except
    # for a scale of 1, which is another program.
    steps = [2, 3, 2, 3, 2, 2, 2, 2]
    rows = [
        {"prompt": str(i), "seed": i, "guidance_scale": 8 - i, "num_steps": n}
        for i, n in enumerate(steps)
    ]
    rows[4]["negative_prompt"] = "red"
    rows[3]["solver"] = "euler"
    assert sample("--prompts", prompts(*rows)) == 0
    assert calls == [["0", "2", "4", "5"], ["6"], ["1"], ["3"], ["7"]]


def test_it_resumes_and_ends_the_same(sample, prompts, tmp_path, monkeypatch, capsys):
    file = prompts(*numbered(10))
    assert sample("--prompts", file) == 0
    out = tmp_path / "out"
    whole = contents(out)
    out.rename(tmp_path / "whole")
    made = []
    generate = batch_generate.generate

    def dies_at_the_second(pipeline, settings, **_):
        if len(made) % 2:
            made.append("death")
            raise KeyboardInterrupt
        made.append(len(settings))
        return generate(pipeline, settings)

    monkeypatch.setattr(batch_generate, "generate", dies_at_the_second)
    for there in (4, 8):
        assert sample("--prompts", file) == 130
        assert len(manifest(out)) == there
        assert len(list(out.iterdir())) == there + 1
    capsys.readouterr()
    assert sample("--prompts", file) == 0
    assert made == [4, "death", 4, "death", 2]
    assert "8 images were there already" in capsys.readouterr().out
    assert contents(out) == whole


def test_a_kill_between_a_file_and_its_line_is_repaired(sample, prompts, tmp_path):
    file = prompts(*numbered(3))
    assert sample("--prompts", file) == 0
    out = tmp_path / "out"
    whole = contents(out)
    path = out / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (out / ".partial-1-0123456789abcdef").write_bytes(b"half")
    (out / ".jaxdiff-lock").write_bytes(b"{}")
    (out / "0001-a-small-red-pea-1.png").unlink()
    assert sample("--prompts", file) == 0
    assert contents(out) == whole


def test_only_what_was_changed_is_generated_again(sample, prompts, tmp_path, calls):
    rows = numbered(4)
    assert sample("--prompts", prompts(*rows)) == 0
    calls.clear()
    assert sample("--prompts", prompts(*rows)) == 0
    assert calls == []
    out = tmp_path / "out"
    (out / "0003-a-small-red-pea-3.png").unlink()
    (out / "0002-a-small-red-pea-2.png").write_bytes(b"mine")
    rows[0]["guidance_scale"] = 2
    assert sample("--prompts", prompts(*rows)) == 0
    assert [sorted(prompts) for prompts in calls] == [[f"{PEA} {i}" for i in (0, 2, 3)]]
    assert [line["row"] for line in manifest(out)] == [0, 1, 2, 3]
    calls.clear()
    assert sample("--prompts", prompts(*rows), "--num-steps", 2) == 0
    assert sum(map(len, calls)) == 4


def test_small_images_come_first(sample, prompts, calls):
    sizes = ["40x32", "32x32", "40x32", "32x32"]
    rows = [{"prompt": str(i), "size": size} for i, size in enumerate(sizes)]
    assert sample("--prompts", prompts(*rows), "--num-steps", 2) == 0
    assert calls == [["1", "3"], ["0", "2"]]


def test_each_row_may_have_several_images(sample, prompts, tmp_path):
    rows = [{"prompt": PEA, "seed": 5}, {"prompt": TOMATO, "seed": 2**32 - 2}]
    assert sample("--prompts", prompts(*rows), "--num-images", 3) == 1
    lines = manifest(tmp_path / "out")
    assert [(x["file"], x["seed"]) for x in lines] == [
        (f"0000-{i}-a-small-red-pea.png", 5 + i) for i in range(3)
    ]


def test_invalid_rows_are_reported_and_the_others_rendered(sample, prompts, tmp_path, capsys):
    rows = [
        {"prompt": PEA},
        "no json",
        {"prompt": PEA, "size": "33x32"},
        {"prompt": PEA, "init_image": "missing.png"},
        {"prompt": PEA, "strength": 0.5},
        {"prompt": PEA, "name": "twin"},
        {"prompt": PEA, "name": "Twin"},
        {"prompt": TOMATO},
    ]
    assert sample("--prompts", prompts(*rows), "--verbose") == 1
    errors = capsys.readouterr().err
    for line, reason in {
        2: "it is not valid JSON",
        3: "multiples of 8",
        4: "missing.png cannot be read",
        5: "strength has no effect without init_image: give init_image as well",
        7: "that of line 6",
    }.items():
        assert any(f"a.jsonl, line {line}:" in x and reason in x for x in errors.splitlines())
    assert "5 of 8 rows of a.jsonl have no image" in errors
    assert errors.count("image 3/3") == 1
    assert "Traceback" not in errors
    assert [line["row"] for line in manifest(tmp_path / "out")] == [0, 5, 7]


def test_a_file_of_invalid_rows_alone_renders_nothing(sample, prompts, tmp_path, capsys):
    assert sample("--prompts", prompts({"prompt": ""})) == 1
    assert "line 1: prompt is empty" in capsys.readouterr().err


def test_too_little_memory_for_a_size_is_reported(sample, prompts, tmp_path, monkeypatch, capsys):
    generate = batch_generate.generate

    def fails_for_large(pipeline, settings, **_):
        if settings[0].size == (64, 64):
            raise MemoryError
        return generate(pipeline, settings)

    monkeypatch.setattr(batch_generate, "generate", fails_for_large)
    assert sample("--prompts", prompts({"prompt": PEA, "size": "64x64"}, {"prompt": PEA})) == 1
    assert "line 1: there is not enough memory for 64x64" in capsys.readouterr().err
    assert [line["row"] for line in manifest(tmp_path / "out")] == [1]


def test_a_prompt_that_is_too_long_is_reported_with_its_line(sample, prompts, capsys):
    assert sample("--prompts", prompts({"prompt": PEA}, {"prompt": "pea " * 30})) == 0
    assert "line 2: the prompt is longer than the 16 tokens" in capsys.readouterr().err


def picture(path, seed, side=32):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_rows_start_from_images_beside_their_file(sample, prompts, model, tmp_path, capsys):
    pixels = picture(tmp_path / "a.png", seed=0)
    picture(tmp_path / "large.png", seed=1, side=64)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    rows = [
        {"prompt": PEA, "init_image": "a.png", "mask": "mask.png", "seed": 1},
        {"prompt": PEA},
        {"prompt": PEA, "init_image": "a.png", "mask": "large.png"},
        {"prompt": PEA, "init_image": "a.png", "size": "64x64"},
        {"prompt": PEA, "init_image": "a.jsonl"},
    ]
    file = prompts(*rows)
    assert sample("--prompts", file, "--strength", "0.7") == 1
    errors = capsys.readouterr().err
    assert "line 3: The mask large.png is 64x64, not 32x32" in errors
    assert "line 4: The image a.png is 32x32, not 64x64" in errors
    assert "line 5:" in errors
    assert "a.jsonl is not a readable image" in errors
    out = tmp_path / "out"
    assert [line["row"] for line in manifest(out)] == [0, 1]
    image = np.asarray(Image.open(out / "0000-a-small-red-pea.png"))
    expected = load(model)(
        PEA, seeds=1, init=InitImage(image=pixels, mask=mask / 255, strength=0.7)
    )
    np.testing.assert_array_equal(image, expected[0])
    np.testing.assert_array_equal(image[:, :16], pixels[:, :16])
    settings = manifest(out)[0]["settings"]
    digest = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    assert settings["init_image"] == {"file": "a.png", "sha256": digest}
    # Another image under the same name is another row.
    picture(tmp_path / "a.png", seed=2)
    assert sample("--prompts", file, "--strength", "0.7") == 1
    assert (np.asarray(Image.open(out / "0000-a-small-red-pea.png")) != image).any()


def test_rows_start_from_deep_images_and_transparent_masks(
    sample, prompts, model, tmp_path, capsys
):
    grey = np.linspace(0, 65535, 32).astype(np.uint16)[None].repeat(32, 0)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    stroke = np.zeros((32, 32, 4), np.uint8)
    stroke[:, 16:] = 255
    Image.fromarray(stroke).save(tmp_path / "stroke.png")
    stroke[4:8, 16:, :3] = 0
    Image.fromarray(stroke).save(tmp_path / "ambiguous.png")
    Image.new("F", (32, 32)).save(tmp_path / "float.tiff")
    rows = [
        {"prompt": PEA, "init_image": "deep.png", "mask": "stroke.png", "seed": 1},
        {"prompt": PEA, "init_image": "deep.png", "mask": "ambiguous.png"},
        {"prompt": PEA, "init_image": "float.tiff"},
    ]
    assert sample("--prompts", prompts(*rows)) == 1
    errors = capsys.readouterr().err
    assert "line 2: " in errors
    assert "its transparency contradicts its brightness" in errors
    assert "line 3: " in errors
    assert "its values are floating point" in errors
    image = np.asarray(Image.open(tmp_path / "out" / "0000-a-small-red-pea.png"))
    pixels = np.rint(grey / 257).astype(np.uint8)[..., None].repeat(3, -1)
    init = InitImage(image=pixels, mask=stroke[..., 3] / 255)
    np.testing.assert_array_equal(image, load(model)(PEA, seeds=1, init=init)[0])
    np.testing.assert_array_equal(image[:, :16], pixels[:, :16])


def devices(monkeypatch, count):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:count])


def test_devices_share_the_rows_and_change_no_file(sample, prompts, tmp_path, monkeypatch, calls):
    steps = [2, 3, 2, 3, 2, 2, 2, 1]
    rows = [{"prompt": f"{PEA} {i}", "seed": i, "num_steps": n} for i, n in enumerate(steps)]
    file = prompts(*rows)
    assert sample("--prompts", file) == 0
    alone = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "alone")
    devices(monkeypatch, 8)
    calls.clear()
    assert sample("--prompts", file) == 0
    assert len(calls) == 1
    assert contents(tmp_path / "out") == alone


def test_processes_share_the_rows_and_leave_one_manifest(sample, prompts, tmp_path, monkeypatch):
    file = prompts(*numbered(7), {"prompt": ""})
    assert sample("--prompts", file) == 1
    alone = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "alone")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    # One after the other instead of both at a time: no waiting, and the same counts of both.
    monkeypatch.setattr(batch_generate, "_wait_for_all", lambda _: None)
    monkeypatch.setattr(multihost, "broadcast_text", lambda text: text)
    gather = batch_generate.multihost_utils
    monkeypatch.setattr(gather, "process_allgather", lambda x, **_: np.stack([x, x]))
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sample("--prompts", file) == 1
        images = [p for p in (tmp_path / "out").iterdir() if p.suffix == ".png"]
        assert len(images) == (3 if process else 7)
    assert contents(tmp_path / "out") == alone


@pytest.mark.slow
def test_200_rows_of_mixed_settings_compile_nothing(sample, prompts, compilations):
    rng = np.random.default_rng(0)
    steps = np.rint([*np.geomspace(1, 12, 199), 100]).astype(int)
    rows = [
        {
            "prompt": " ".join(rng.choice(["a", "red", "green", "pea", "tomato"], size=5)),
            "negative_prompt": str(rng.choice(["", "a stem", TOMATO])),
            "seed": int(rng.integers(2**32)),
            "num_steps": int(n),
            "guidance_scale": float(rng.uniform(0, 9)),
        }
        for n in rng.permutation(steps)
    ]
    assert sample("--prompts", prompts(rows[0])) == 0
    compilations.clear()
    assert sample("--prompts", prompts(*rows)) == 0
    assert not compilations


def test_rows_of_several_kinds_compile_once_for_each_kind(sample, prompts, tmp_path, compilations):
    picture(tmp_path / "a.png", seed=0)
    rng = np.random.default_rng(0)
    ways = [
        lambda: {"apg": 0.5, "guidance_rescale": 0.5, "guidance_interval": "0-0.9"},
        lambda: {"init_image": "a.png", "variation": float(rng.uniform())},
        lambda: {"upscale": 2, "upscale_strength": float(rng.uniform())},
        lambda: {"best_of": int(rng.integers(2, 5))},
    ]
    rows = [
        {"prompt": PEA, "seed": int(rng.integers(2**31)), "num_steps": 3 + i % 4, **way()}
        for i in range(5)
        for way in ways
    ]
    assert sample("--prompts", prompts(*rows[: len(ways)]), "--num-steps", 3) == 0
    compilations.clear()
    assert sample("--prompts", prompts(*rows)) == 0
    assert not compilations
    lines = manifest(tmp_path / "out")
    assert len(lines) == len(rows)
    for line in lines:
        file = tmp_path / "out" / line["file"]
        seed = line.get("chosen_seed", line["seed"])
        assert read_image_text(file)["seed"] == str(seed)
        of = line["settings"].get("best_of", 1)
        assert 0 <= seed - line["seed"] < of
        assert ("chosen_seed" in line) == (of > 1)
    assert sample("--prompts", prompts(*rows)) == 0
    assert manifest(tmp_path / "out") == lines  # none was generated again


@pytest.mark.nightly
def test_each_row_has_its_scale_of_autoguidance(sample, prompts, model, tiny_bundle, tmp_path):
    params = jax.tree.map(lambda x: 0.8 * x, tiny_bundle.params)
    guide = str(tmp_path / "guide")
    write_bundle(guide, tiny_bundle._replace(params=params), "float32")
    rows = [{"prompt": PEA, "guide_scale": scale} for scale in (1, 2, 3)] + [{"prompt": PEA}]
    assert sample("--prompts", prompts(*rows), "--guide-model", guide) == 0
    pipeline = load(model)
    for i, scale in enumerate((1.0, 2.0, 3.0, 1.5)):
        image = np.asarray(Image.open(tmp_path / "out" / f"000{i}-a-small-red-pea.png"))
        guidance = Guidance(guide=Autoguidance(model=guide, scale=scale)) if scale != 1 else None
        np.testing.assert_array_equal(image, pipeline(PEA, seeds=0, guidance=guidance)[0])


@pytest.mark.parametrize("kind", ["webp", "jpg"])
def test_files_of_another_format_are_recognised(sample, prompts, tmp_path, calls, kind):
    words = ("--prompts", prompts(*numbered(2)), "--format", kind)
    assert sample(*words) == 0
    calls.clear()
    assert sample(*words) == 0
    assert not calls
    assert [line["file"] for line in manifest(tmp_path / "out")] == [
        f"000{i}-a-small-red-pea-{i}.{kind}" for i in range(2)
    ]


def test_a_text_too_long_for_the_format_is_an_error_of_the_row(sample, prompts, tmp_path, capsys):
    file = prompts({"prompt": "pea " * 30_000}, {"prompt": PEA})
    assert sample("--prompts", file, "--format", "jpg") == 1
    assert "line 1: The prompt and the settings are too long" in capsys.readouterr().err
    assert [line["row"] for line in manifest(tmp_path / "out")] == [1]


def test_a_grid_of_each_size_is_written_if_asked_for(sample, prompts, tmp_path):
    rows = [*numbered(3), {"prompt": PEA, "size": "40x32"}]
    assert sample("--prompts", prompts(*rows), "--grid") == 0
    assert Image.open(tmp_path / "out" / "grid-32x32.png").size == (70, 70)
    assert Image.open(tmp_path / "out" / "grid-40x32.png").size == (44, 36)


def test_rows_may_mix_two_prompts(sample, prompts, model, tmp_path):
    row = {"prompt": PEA, "seed": 3, "mix_prompt": TOMATO, "mix_seed": 8}
    rows = [row | {"mix": share} for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert sample("--prompts", prompts(*rows)) == 0
    frames = edit.interpolate(load(model), (PEA, TOMATO), 5, seeds=(3, 8))
    for i, frame in enumerate(frames):
        image = np.asarray(Image.open(tmp_path / "out" / f"000{i}-a-small-red-pea.png"))
        # Noise of two seeds at a time is rounded differently from that of one.
        np.testing.assert_allclose(image.astype(int), frame, atol=1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--prompts", "missing.jsonl"), "cannot be read"),
        (("--prompts", "a.yaml"), "has an unknown format"),
        (("--prompts", "a.jsonl", PEA), "exclude each other"),
        (("--prompts", "a.jsonl", "--strip", "3"), "--strip and --prompts exclude each other"),
        (
            ("--prompts", "a.jsonl", "--interpolate", "3"),
            "--interpolate and --prompts exclude each other",
        ),
        (("--prompts", "a.jsonl", "--size", "3"), "--size is '3'"),
        (("--prompts", "a.jsonl", "--init-image", "missing.png"), "missing.png cannot be read"),
    ],
)
def test_a_user_error_has_exit_status_2(
    sample, prompts, tmp_path, monkeypatch, capsys, words, expected
):
    prompts({"prompt": PEA})
    monkeypatch.chdir(tmp_path)
    assert sample(*words) == 2
    assert expected in capsys.readouterr().err


def test_unknown_words_are_said_once_and_listed_with_each_image(sample, prompts, tmp_path, capsys):
    rows = prompts({"prompt": "a tomatto"}, {"prompt": "a snow tomatto"}, {"prompt": "red snow"})
    run = ("--prompts", rows, "--num-steps", 1)
    assert sample(*run) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "no training caption" in line]
    assert [line.partition(": the prompt has words that no training ")[2] for line in said] == [
        "caption contains: 'tomatto' (nearest: tomato); `jaxdiff sample --words` lists the known "
        "ones.",
        "caption contains: 'snow'; `jaxdiff sample --words` lists the known ones.",
    ]
    assert ["line 1" in said[0], "line 2" in said[1]] == [True, True]
    lines = manifest(tmp_path / "out")
    assert [line["unknown_words"] for line in lines] == [
        {"tomatto": ["tomato"]},
        {"snow": [], "tomatto": ["tomato"]},
        {"snow": []},
    ]
    assert sample(*run) == 0
    assert manifest(tmp_path / "out") == lines  # none was generated again
