import dataclasses
import json
import shutil
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from jaxdiff.io.image_files import read_image_text
from jaxdiff.io.images import save_png
from jaxdiff.models.text_encoders.clip import ClipConfig, ClipVisionConfig
from jaxdiff.pipelines.auxiliary_models import clip_scores
from jaxdiff.pipelines.load import load
from jaxdiff.pretrained.bundle import Bundle, abstract_of, write_bundle
from jaxdiff.sampling.sampler import Sampler
from tests.io.conftest import chunk, png

PEA = "a small red pea"


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def generated(sample, tmp_path):
    """An image none of whose settings is the model's own."""
    words = ("--seed", 11, "--num-steps", 2, "--guidance-scale", 1.7, "--solver", "dpm++2m")
    assert sample(PEA, *words, "--negative-prompt", "green, or: red", "--size", "32x40") == 0
    return tmp_path / "out" / "0000-a-small-red-pea.png"


def test_the_parameters_are_as_web_uis_write_them(generated, model):
    text = read_image_text(generated)
    *lines, last = text["parameters"].split("\n")
    assert lines == [PEA, "Negative prompt: green, or: red"]
    assert last == (
        "Steps: 2, Sampler: DPM++ 2M, CFG scale: 1.7, Seed: 11, Size: 32x40, Model: tiny, "
        f"Model hash: {text['model_fingerprint'][:10]}"
    )


def test_the_same_pixels_are_reproduced(sample, generated, tmp_path, capsys):
    assert sample("--again", generated) == 0
    assert "The same pixels." in capsys.readouterr().out
    again = tmp_path / "out" / "0000-a-small-red-pea-again.png"
    np.testing.assert_array_equal(pixels(again), pixels(generated))
    assert again.read_bytes() == generated.read_bytes()


def test_a_quantised_model_is_named_in_the_file(sample, tmp_path, capsys):
    assert sample(PEA, "--num-steps", 2, "--quantize", "int8") == 0
    file = tmp_path / "out" / "0000-a-small-red-pea.png"
    assert json.loads(read_image_text(file)["details"])["quantize"] == "int8"
    assert sample("--again", file) == 0
    assert "The same pixels." in capsys.readouterr().out
    assert sample("--again", file, "--quantize", "fp8") == 2
    assert "with the same --lora, --embedding, --dtype and --quantize" in capsys.readouterr().err


def test_other_pixels_are_reported(sample, generated, tmp_path, capsys):
    other = pixels(generated).copy()
    other[3, 4, 1] ^= 8
    save_png(tmp_path / "other.png", other, read_image_text(generated))
    assert sample("--again", tmp_path / "other.png") == 1
    assert "they differ by up to 8 of 255" in capsys.readouterr().out
    save_png(tmp_path / "other.png", other[:8], read_image_text(generated))
    assert sample("--again", tmp_path / "other.png") == 1
    assert "was resized" in capsys.readouterr().out


def test_an_image_of_an_image_is_reproduced_from_that_one(sample, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        save_png(tmp_path / name, rng.integers(0, 256, (32, 32, 3), np.uint8))
    assert sample(PEA, "--init-image", tmp_path / "a.png", "--strength", "0.5") == 0
    file = tmp_path / "out" / "0000-a-small-red-pea.png"
    assert "Denoising strength: 0.5" in read_image_text(file)["parameters"]
    assert sample("--again", file, "--init-image", tmp_path / "a.png") == 0
    renamed = (tmp_path / "a.png").rename(tmp_path / "c.png")
    assert sample("--again", file, "--init-image", renamed) == 0
    for words in ((), ("--init-image", tmp_path / "b.png")):
        assert sample("--again", file, *words) == 2
        assert "was made from a.png" in capsys.readouterr().err


def test_the_same_pixels_are_reproduced_from_webp_but_not_from_jpeg(sample, tmp_path, capsys):
    stem = tmp_path / "out" / "0000-a-small-red-pea"
    for kind in ("png", "webp", "jpg"):
        assert sample(PEA, "--negative-prompt", "茄子", "--format", kind) == 0
    np.testing.assert_array_equal(
        pixels(stem.with_suffix(".webp")), pixels(stem.with_suffix(".png"))
    )
    assert read_image_text(stem.with_suffix(".webp")) == read_image_text(stem.with_suffix(".png"))
    assert sample("--again", stem.with_suffix(".webp")) == 0
    assert (tmp_path / "out" / "0000-a-small-red-pea-again.webp").exists()
    assert sample("--again", stem.with_suffix(".jpg")) == 2
    assert "whose compression changes pixels" in capsys.readouterr().err
    comment = Image.open(stem.with_suffix(".jpg")).getexif().get_ifd(0x8769)[0x9286]
    text = read_image_text(stem.with_suffix(".png"))["parameters"]
    assert comment == b"UNICODE\0" + text.encode("utf-16-be")


def test_a_mixture_of_two_prompts_is_reproduced(sample, tmp_path):
    words = ("--mix-prompt", "a green tomato", "--mix-seed", 5, "--mix", 0.3, "--resample-steps", 2)
    assert sample(PEA, "--num-steps", 2, *words) == 0
    file = tmp_path / "out" / "0000-a-small-red-pea.png"
    settings = json.loads(read_image_text(file)["settings"])
    assert [settings[k] for k in ("mix_prompt", "mix_seed", "mix", "resample_steps")] == [
        "a green tomato",
        5,
        0.3,
        2,
    ]
    assert sample("--again", file) == 0


def test_the_noise_of_each_copy_of_a_mixture_is_its_own(sample, tmp_path):
    """The second prompt's noise is that of the image's seed by default, also of the second one."""
    words = (PEA, "--num-steps", 2, "--mix-prompt", "a green tomato")
    assert sample(*words, "--seed", 5, "--num-images", 2) == 0
    second = pixels(tmp_path / "out" / "0001-a-small-red-pea.png")
    assert sample(*words, "--seed", 6) == 0
    first = tmp_path / "out" / "0000-a-small-red-pea.png"
    np.testing.assert_array_equal(pixels(first), second)
    assert sample("--again", first) == 0


@pytest.fixture(scope="module")
def clips(tiny_bundle, tmp_path_factory):
    """Two CLIPs with random weights."""
    text = dataclasses.replace(tiny_bundle.spec.conditioner.text.model, projection_dim=8)
    vision = ClipVisionConfig(
        image_size=16, patch_size=8, width=16, depth=1, heads=2, projection_dim=8
    )
    config = ClipConfig(text=text, vision=vision)
    folders = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda leaf, rng=rng: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
            abstract_of(config),
        )
        folders.append(tmp_path_factory.mktemp("clip"))
        write_bundle(folders[-1], Bundle(config, params, tiny_bundle.tokenizers), "float32")
    return folders


def test_an_image_of_clip_guidance_is_reproduced_with_that_clip(sample, clips, tmp_path, capsys):
    words = ("--clip-model", clips[0])
    assert sample(PEA, "--num-steps", 2, "--clip-scale", 3, "--clip-interval", "0.2-1", *words) == 0
    file = tmp_path / "out" / "0000-a-small-red-pea.png"
    settings = json.loads(read_image_text(file)["settings"])
    assert (settings["clip_scale"], settings["clip_interval"]) == (3.0, "0.2-1")
    assert "CLIP guidance: 3" in read_image_text(file)["parameters"]
    assert sample("--again", file, *words) == 0
    assert sample("--again", file, "--clip-model", clips[1]) == 2
    assert "was made with another CLIP" in capsys.readouterr().err


@pytest.fixture(scope="module")
def guides(tiny_bundle, tmp_path_factory):
    """Folders of two worse models."""
    folders = []
    for scale in (0.8, 0.9):
        params = jax.tree.map(lambda x, scale=scale: scale * x, tiny_bundle.params)
        folders.append(tmp_path_factory.mktemp("guide"))
        write_bundle(folders[-1], tiny_bundle._replace(params=params), "float32")
    return folders


def test_guidance_of_all_kinds_is_reproduced(sample, guides, tmp_path, capsys):
    words = ("--guidance-interval", "0-0.99", "--guidance-rescale", 0.25, "--apg", 0.5)
    words += ("--cfg-zero-star", 1, "--guide-scale", 2.5, "--guidance-scale", 3)
    assert sample(PEA, *words, "--guide-model", guides[0]) == 0
    file = tmp_path / "out" / "0000-a-small-red-pea.png"
    settings = json.loads(read_image_text(file)["settings"])
    assert (
        settings.items()
        >= {
            "guidance_interval": "0-0.99",
            "guidance_rescale": 0.25,
            "apg": 0.5,
            "cfg_zero_star": 1,
            "guide_scale": 2.5,
        }.items()
    )
    assert sample("--again", file, "--guide-model", guides[0]) == 0
    assert file.with_stem(f"{file.stem}-again").read_bytes() == file.read_bytes()
    assert sample("--again", file) == 2
    assert "give --guide-model" in capsys.readouterr().err
    assert sample("--again", file, "--guide-model", guides[1]) == 2
    assert "another guide model: give that as --guide-model" in capsys.readouterr().err


def test_a_refiner_takes_over_and_is_reproduced(sample, model, guides, tmp_path, capsys):
    assert sample(PEA, "--num-steps", 4, "--refiner-model", guides[1], "--refiner-start", 0.5) == 0
    file = tmp_path / "out" / "0000-a-small-red-pea.png"
    options = {"seeds": 0, "num_steps": 4}
    base = load(model)(
        PEA, sampler=Sampler(denoising_interval=(0, 0.5)), output="latents", **options
    )
    rest = Sampler(denoising_interval=(0.5, 1))
    image = load(guides[1])(PEA, sampler=rest, latents=base, **options)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(file)), image)
    assert sample("--again", file, "--refiner-model", guides[1]) == 0
    assert sample("--again", file, "--refiner-model", guides[0]) == 2
    assert "another refiner: give that as --refiner-model" in capsys.readouterr().err
    assert sample("--again", file) == 2
    assert "give --refiner-model" in capsys.readouterr().err


def test_the_best_of_several_has_the_file_of_its_seed_alone(sample, clips, tmp_path):
    words = (PEA, "--size", "16:9", "--seamless", "--num-steps", 1, "--seed", 4)
    assert sample(*words, "--best-of", 3, "--clip-model", clips[0]) == 0
    file = tmp_path / "out" / "0000-a-small-red-pea.png"
    text = read_image_text(file)
    assert json.loads(text["settings"])["size"] == "40x24"
    assert json.loads(text["settings"])["seamless"] is True
    assert json.loads(text["details"])["sampler"]["wrap"] == [True, True]
    assert sample("--again", file) == 0
    assert file.with_stem(f"{file.stem}-again").read_bytes() == file.read_bytes()
    assert sample(*words, "--num-images", 3, "--out", tmp_path / "all") == 0
    every = sorted((tmp_path / "all").glob("0*.png"))
    images = np.stack([pixels(path) for path in every])
    best = clip_scores(str(clips[0]), images, [PEA] * 3).argmax()
    assert text["seed"] == str(4 + best)
    assert every[best].read_bytes() == file.read_bytes()


def test_variations_and_upscaled_images_are_reproduced(sample, tmp_path, capsys):
    image = tmp_path / "a.png"
    save_png(image, np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    varied = ("--init-image", image, "--variation", 0.5, "--num-steps", 2)
    upscaled = ("--upscale", 2, "--upscale-strength", 0.5, "--num-steps", 2)
    for words, again, expected in (
        (varied, ("--init-image", image), {"variation": 0.5, "guidance_scale": 1.0}),
        (upscaled, (), {"upscale": 2, "upscale_strength": 0.5}),
    ):
        assert sample(PEA, *words) == 0
        file = tmp_path / "out" / "0000-a-small-red-pea.png"
        assert json.loads(read_image_text(file)["settings"]).items() >= expected.items()
        assert sample("--again", file, *again) == 0
        assert file.with_stem(f"{file.stem}-again").read_bytes() == file.read_bytes()
    assert pixels(file).shape == (64, 64, 3)
    assert "Size: 64x64" in read_image_text(file)["parameters"]


def test_another_model_is_refused(sample, generated, tiny_bundle, tmp_path, capsys):
    other = tiny_bundle._replace(params=jax.tree.map(lambda x: x * 1.01, tiny_bundle.params))
    write_bundle(tmp_path / "other", other, dtype="float32")
    assert sample("--again", generated, "--model", tmp_path / "other") == 2
    message = capsys.readouterr().err
    assert f"fingerprint {read_image_text(generated)['model_fingerprint'][:10]}" in message
    assert "give that model as --model" in message


def test_a_model_with_another_sampler_is_refused(sample, generated, model, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for path in model.iterdir():
        if path.is_file():
            (other / path.name).write_bytes(path.read_bytes())
    shutil.copytree(model / "tokenizers", other / "tokenizers")
    recipe = json.loads((other / "config.json").read_text())
    recipe["sampler"]["guidance"] = {"type": "Guidance", "rescale": 0.5}
    (other / "config.json").write_text(json.dumps(recipe))
    assert sample("--again", generated, "--model", other) == 2
    assert "with another sampler" in capsys.readouterr().err


def test_a_file_of_a_version_with_fewer_options_is_reproduced(sample, generated, tmp_path):
    text = read_image_text(generated)
    details = json.loads(text["details"])
    del details["sampler"]["denoising_interval"], details["sampler"]["guidance"]["distilled"]
    text["details"] = json.dumps(details)
    save_png(tmp_path / "earlier.png", pixels(generated), text)
    assert sample("--again", tmp_path / "earlier.png") == 0


def test_a_file_without_the_text_is_refused(sample, generated, tmp_path, capsys):
    bare = tmp_path / "bare.png"
    save_png(bare, pixels(generated), {"prompt": PEA})
    assert sample("--again", bare) == 2
    assert "has no metadata" in capsys.readouterr().err
    assert sample("--again", tmp_path / "missing.png") == 2
    assert "missing.png cannot be read" in capsys.readouterr().err


BOMB = zlib.compress(b"a" * 50_000_000)


@pytest.mark.parametrize(
    ("before", "size", "message"),
    [
        (chunk(b"zTXt", b"prompt\0\0" + BOMB), 32, "is not a readable PNG or WebP file"),
        (chunk(b"iTXt", b"prompt\0\1\0\0\0" + BOMB), 32, "is not a readable PNG or WebP file"),
        (b"", 20_000, "is not a readable PNG or WebP file"),
        (chunk(b"tEXt", b"parameters\0Steps: 20"), 32, "has no metadata prompt"),
    ],
)
def test_files_of_others_are_refused_in_one_sentence(
    sample, tmp_path, capsys, before, size, message
):
    data = png([bytes(96)] * 32, width=32, before=before)
    header = struct.pack(">II", 32, 32)
    data = data.replace(header, struct.pack(">II", size, size), 1)
    crc = zlib.crc32(data[12:29])
    (tmp_path / "a.png").write_bytes(data[:29] + struct.pack(">I", crc) + data[33:])
    assert sample("--again", tmp_path / "a.png") == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", "{"),
        ("settings", "[]"),
        ("settings", "{}"),
        ("details", "{}"),
        ("details", '{"dtype": "float3"}'),
        ("settings", '{"size": "32x32", "init_image": 3}'),
        ("seed", "eleven"),
        ("settings", '{"size": "3"}'),
        ("settings", '{"negative_prompt": "", "num_steps": 2, "size": "32x40", "more": 1}'),
        ("details", '{"sampler": [], "dtype": "float32"}'),
    ],
)
def test_a_text_that_was_changed_is_refused(sample, generated, tmp_path, capsys, name, value):
    save_png(tmp_path / "a.png", pixels(generated), read_image_text(generated) | {name: value})
    assert sample("--again", tmp_path / "a.png") == 2
    assert "is not as jaxdiff wrote it" in capsys.readouterr().err


def test_flags_that_would_change_it_are_refused(sample, generated, capsys):
    assert sample("--again", generated, "--num-steps", 3) == 2
    assert "--num-steps and --again exclude each other" in capsys.readouterr().err
    assert sample(PEA, "--again", generated) == 2
    assert "exclude each other" in capsys.readouterr().err
