"""Tiny models of FLUX.1, FLUX.2 klein and Z-Image, written as diffusers has them and read back."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.errors import UserError
from jaxdiff.pretrained.diffusers_folder import read_diffusers, write_diffusers
from jaxdiff.pretrained.load import read_spec, read_tokenizers
from jaxdiff.pretrained.pipeline_folder import INDEX
from jaxdiff.sampling.solvers_ode import DDIM, Heun
from tests.pretrained.families import SPECS, random_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """`bundle(name, dtype)`: one of `SPECS` with random weights and tokenizers."""

    def make(name, dtype=np.float32):
        return random_bundle(name, tmp_path_factory.mktemp("tokenizers"), dtype)

    return make


@pytest.mark.parametrize("name", SPECS)
def test_it_comes_back_bit_for_bit(name, bundle, tmp_path):
    there = bundle(name, ml_dtypes.bfloat16)
    write_diffusers(tmp_path / "tiny", there)
    back = read_diffusers(tmp_path / "tiny", place=np.asarray)
    assert back.spec.sampler == there.spec.sampler
    encoders = there.spec.conditioner.encoders
    if "text_2" not in encoders:  # above the states that it reads, Qwen3 has one layer
        encoder = encoders["text"]
        depth = encoder.hidden_layers[-1] + 1
        assert back.spec.conditioner.text.model.depth == depth == encoder.model.depth
    assert back.spec == read_spec(tmp_path / "tiny") == there.spec
    jax.tree.map(np.testing.assert_array_equal, back.params, there.params)
    assert jax.tree.structure(back.params) == jax.tree.structure(there.params)
    for tokenizers in (back.tokenizers, read_tokenizers(tmp_path / "tiny")):
        assert set(tokenizers) == set(encoders)
        for part, tokenizer in tokenizers.items():
            ids = there.tokenizers[part](["a red pea"])
            np.testing.assert_array_equal(tokenizer(["a red pea"]), ids)


@pytest.fixture(scope="module")
def folders(bundle, tmp_path_factory):
    """Folders of one model of each family, which tests copy before they damage them."""
    root = tmp_path_factory.mktemp("families")
    names = ("FLUX.1 dev", "klein", "Z-Image")
    for name in names:
        write_diffusers(root / name, bundle(name))
    return {name: root / name for name in names}


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def remove(part):
    return lambda folder: shutil.rmtree(folder / part)


def config_of(part, **changes):
    return lambda folder: edit(folder / part / "config.json", **changes)


def index_of(**changes):
    return lambda folder: edit(folder / INDEX, **changes)


WRONG = {
    "no text encoder": ("klein", remove("text_encoder"), r"text_encoder/config\.json"),
    "no weights of it": (
        "Z-Image",
        lambda folder: (folder / "text_encoder" / "model.safetensors").unlink(),
        r"text_encoder holds no weights: expected model\.safetensors",
    ),
    "no tokenizer": ("klein", remove("tokenizer"), "has no tokenizer: expected one for its text"),
    "a second tokenizer": ("FLUX.1 dev", remove("tokenizer_2"), "has no tokenizer_2: expected one"),
    "not named": (
        "FLUX.1 dev",
        index_of(text_encoder_2=[None, None]),
        "names no text_encoder_2: expected one for a FluxPipeline",
    ),
    "another class": (
        "klein",
        index_of(text_encoder=["transformers", "Mistral3ForConditionalGeneration"]),
        "text_encoder is .*Mistral3.*: expected .*Qwen3ForCausalLM",
    ),
    "a smaller text encoder": (
        "klein",
        config_of("text_encoder", hidden_size=6),
        "expects tokens of width 24 and the text encoder gives 18: expected equal widths",
    ),
    "another width of CLIP": (
        "FLUX.1 dev",
        config_of("text_encoder", hidden_size=8),
        "expects the pooled text of width 6 and the text encoder gives 8",
    ),
    "fewer layers": (
        "klein",
        config_of("text_encoder", num_hidden_layers=20),
        "hidden_layers are .*: expected .* the last from 1 to the 20",
    ),
    "weights of another size": (
        "Z-Image",
        config_of("text_encoder", intermediate_size=16),
        "text_encoder: tensors of another shape: .*gate_proj",
    ),
    "too few ids": (
        "klein",
        config_of("text_encoder", vocab_size=200),
        r"text_encoder/config\.json: vocab_size is 200: expected at least 30",
    ),
    "another autoencoder": (
        "Z-Image",
        config_of("vae", latent_channels=8),
        "latents of 4 channels and vae/config.json gives 8: expected equal numbers",
    ),
    "quantised": (
        "klein",
        config_of("transformer", quantization_config={"quant_method": "bitsandbytes"}),
        "quantization_config",
    ),
    "Mistral": ("klein", index_of(_class_name="Flux2Pipeline"), "Flux2Pipeline, whose text .*Mist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_part_that_does_not_fit_is_named(case, folders, tmp_path):
    name, damage, message = WRONG[case]
    folder = tmp_path / "tiny"
    shutil.copytree(folders[name], folder)
    damage(folder)
    placed = []
    with pytest.raises(UserError, match=message) as error:
        read_diffusers(folder, place=placed.append)
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


def test_tensors_of_a_network_are_checked_before_any_is_read(folders, tmp_path):
    shutil.copytree(folders["klein"], tmp_path / "tiny")
    edit(tmp_path / "tiny" / "transformer" / "config.json", num_layers=2)
    placed = []
    with pytest.raises(UserError, match=r"missing tensors: .*transformer_blocks\.1\."):
        read_diffusers(tmp_path / "tiny", place=placed.append)
    assert not placed


def test_layers_above_the_hidden_states_come_from_the_original(bundle, tmp_path):
    """Here two more than diffusers' pipeline reads; without it they are left out."""
    there = bundle("klein")
    write_diffusers(tmp_path / "small", there)
    original = tmp_path / "original"
    shutil.copytree(tmp_path / "small", original)
    file = original / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    deeper = {
        name.replace("layers.27.", f"layers.{layer}."): value + layer
        for layer in (27, 28, 29)
        for name, value in tensors.items()
        if "layers.27." in name
    }
    save_file(tensors | deeper, file, metadata={"format": "pt"})
    edit(original / "text_encoder" / "config.json", num_hidden_layers=30)
    read = read_diffusers(original, place=np.asarray)
    assert read.spec.conditioner.text.model.depth == 30
    for source, expected in ((original, tensors | deeper), (None, tensors)):
        write_diffusers(tmp_path / "back", read, original=source)
        found = load_file(tmp_path / "back" / "text_encoder" / "model.safetensors")
        assert set(found) == set(expected)
        if source is not None:
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"solver": Heun()}, "does not have Heun"), ({"solver": DDIM(), "grid": None}, "TimeGrid")],
)
def test_what_diffusers_cannot_do_is_refused(changes, message, bundle, tmp_path):
    there = bundle("Z-Image")
    sampler = dataclasses.replace(there.spec.sampler, **changes)
    with pytest.raises(UserError, match=message):
        write_diffusers(
            tmp_path, there._replace(spec=dataclasses.replace(there.spec, sampler=sampler))
        )
    assert not (tmp_path / INDEX).exists()
