"""Tiny models of FLUX.1, FLUX.2 klein and Z-Image, loaded from a folder as published ones are."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.cli import main as cli
from jaxdiff.cli.generate.options import SampleFlags, from_flags, open_pipeline
from jaxdiff.cli.parsing import parse_flags
from jaxdiff.errors import UserError
from jaxdiff.pipelines.input_images import InitImage
from jaxdiff.pretrained.diffusers_folder import write_diffusers
from jaxdiff.pretrained.flux_original import write_flux_file
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.pretrained.z_image_original import write_z_image_file
from tests.pretrained.families import random_bundle

PEA, BANANA = "a red pea", "a green banana"
SIZE = {"size": (16, 24)}


@pytest.fixture(scope="module", params=["FLUX.1 dev", "klein base", "Z-Image"])
def model(request, tmp_path_factory):
    """The name, the folder and the pipeline of a model."""
    root = tmp_path_factory.mktemp("model")
    write_diffusers(root / "tiny", random_bundle(request.param, root / "tokenizers"))
    return request.param, root / "tiny", jaxdiff.load(root / "tiny", devices=jax.devices()[:1])


def test_no_argument_of_the_loop_compiles_it_again(model, compilations):
    _, _, pipe = model
    first = pipe(PEA, seeds=1, num_steps=2, **SIZE)
    assert first.shape == (1, 24, 16, 3)
    assert first.std() > 5
    compilations.clear()
    prompts = [BANANA, f"{PEA}, two green bananas, ripe", PEA]
    images = pipe(prompts, seeds=[2**32 - 1, 3, 1], num_steps=2, **SIZE)
    np.testing.assert_array_equal(images[2], first[0])
    assert np.abs(images[0].astype(int) - images[2]).max() > 5
    pipe(PEA, seeds=1, num_steps=3, guidance_scale=2.5, **SIZE)
    assert not compilations


def test_a_negative_prompt_counts_where_there_is_guidance(model):
    name, _, pipe = model
    options = {"seeds": 1, "num_steps": 2, "guidance_scale": 3.0, "output": "float", **SIZE}
    plain, other = pipe(PEA, **options), pipe(PEA, negative_prompt=BANANA, **options)
    assert (np.abs(plain - other).max() > 1e-3) == (name != "FLUX.1 dev")


@pytest.mark.slow
def test_the_rest_of_an_image_is_kept(model):
    _, _, pipe = model
    image = np.random.default_rng(0).integers(0, 256, (1, 24, 16, 3), np.uint8)
    mask = np.zeros((1, 24, 16), np.float32)
    mask[:, 8:] = 1
    init = InitImage(image=image, mask=mask, strength=0.9)
    found = pipe(PEA, init=init, num_steps=2, **SIZE)
    np.testing.assert_array_equal(found[:, :8], image[:, :8])
    assert np.abs(found[:, 8:].astype(int) - image[:, 8:]).max() > 5


@pytest.mark.slow
def test_the_command_line_samples_the_same(model, tmp_path):
    _, folder, _ = model
    options = ["--num-steps", "2", "--size", "16x24", "--seed", "1", "--out", str(tmp_path)]
    assert cli.main(["sample", PEA, "--model", str(folder), *options]) == 0
    file = tmp_path / "0000-a-red-pea.png"
    expected = jaxdiff.load(folder)(PEA, seeds=1, num_steps=2, **SIZE)
    np.testing.assert_array_equal(np.asarray(Image.open(file)), expected[0])


def test_a_transformer_file_with_its_base_gives_the_same_image(model, tmp_path):
    """The base lacks the transformer's weights; both are exported alike, byte for byte."""
    name, folder, pipe = model
    write = write_z_image_file if name == "Z-Image" else write_flux_file
    bundle = load_bundle(folder, place=np.asarray)
    file, base = tmp_path / "mine.safetensors", tmp_path / "base"
    write(file, bundle.params["denoiser"], bundle.spec.denoiser, "model.diffusion_model.")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    shutil.copytree(folder, base)
    (base / weights).unlink()
    mine = jaxdiff.load(file, base=base, devices=pipe.devices)
    assert mine.spec == dataclasses.replace(pipe.spec, name="mine")
    options = {"seeds": 1, "num_steps": 2, **SIZE}
    np.testing.assert_array_equal(mine(PEA, **options), pipe(PEA, **options))
    for out, source in (("mine", [str(file), "--base", str(base)]), ("whole", [str(folder)])):
        export = ["export", *source[:1], str(tmp_path / out), *source[1:], "--format", "diffusers"]
        assert cli.main(export) == 0
    files = {
        out: {
            str(path.relative_to(tmp_path / out)): path.read_bytes()
            for path in (tmp_path / out).rglob("*")
            if path.is_file() and path.name != "README.md"
        }
        for out in ("mine", "whole")
    }
    assert weights in files["mine"]
    assert files["mine"] == files["whole"]


def test_the_command_line_takes_a_transformer_file_and_an_autoencoder(model, tmp_path):
    name, folder, _ = model
    write = write_z_image_file if name == "Z-Image" else write_flux_file
    bundle = load_bundle(folder, place=np.asarray)
    write(tmp_path / "mine.safetensors", bundle.params["denoiser"], bundle.spec.denoiser)
    flags = ["--model", str(tmp_path / "mine.safetensors"), "--base", str(folder)]
    flags += ["--autoencoder", str(folder / "vae")]
    pipe = open_pipeline(from_flags(parse_flags(SampleFlags, [PEA, *flags], prog="sample")))
    assert pipe.fingerprint == jaxdiff.load(folder).fingerprint


def test_weights_of_words_are_t5s_alone(model):
    name, _, pipe = model
    options = {"seeds": 1, "num_steps": 2, "output": "float", **SIZE}
    if name == "FLUX.1 dev":
        weighted, plain = pipe("a (red:1.9) pea", **options), pipe(PEA, **options)
        assert np.abs(weighted - plain).max() > 1e-5
        return
    with pytest.raises(UserError, match="weights words, which Qwen3"):
        pipe("a (red:1.9) pea", **options)
