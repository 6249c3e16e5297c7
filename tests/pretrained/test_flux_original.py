"""FLUX transformers in the original layout: every tensor returns bit for bit."""

import dataclasses
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.flux import FLUX1, FluxConfig
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.pretrained.flux_keys import flux_to_torch
from jaxdiff.pretrained.flux_original import (
    flux_modules,
    flux_to_original,
    read_flux_file,
    write_flux_file,
)
from jaxdiff.pretrained.load import PartSource, load_bundle, read_parts
from tests.pretrained.same_bits import assert_same_bits

BFLOAT16 = ml_dtypes.bfloat16
SMALL: dict[str, Any] = {"heads": 1, "double_depth": 2, "single_depth": 2, "text_width": 8}
CONFIGS = {
    "schnell": dataclasses.replace(FLUX1, **SMALL, channels=4, pooled_width=12),
    "dev": dataclasses.replace(
        FLUX1, **SMALL, channels=4, pooled_width=12, guidance_embedding=True
    ),
    "klein": FluxConfig(**SMALL, channels=8, time_width=16),
}
BOTH = pytest.mark.parametrize("name", CONFIGS)


@BOTH
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_written_file_is_read_bit_for_bit_and_states_its_config(
    tmp_path, random_params, name, prefix
):
    config, file = CONFIGS[name], tmp_path / "flux.safetensors"
    params = random_params(config, BFLOAT16)
    write_flux_file(file, params, config, prefix)
    found, back = read_flux_file(file, place=np.asarray)
    assert found == config
    assert_same_bits(back, params)
    again = tmp_path / "again.safetensors"
    write_flux_file(again, back, found, prefix)
    assert again.read_bytes() == file.read_bytes()


def test_names_and_order_of_rows_are_those_of_the_original_code(tmp_path, random_params):
    config, file = CONFIGS["dev"], tmp_path / "flux.safetensors"
    params = random_params(config, BFLOAT16)
    write_flux_file(file, params, config)
    tensors, theirs = load_file(file), flux_to_torch(params, config)
    qkv = [theirs[f"transformer_blocks.1.attn.add_{x}_proj.bias"] for x in "qkv"]
    assert_same_bits(tensors["double_blocks.1.txt_attn.qkv.bias"], np.concatenate(qkv))
    scale, shift = np.split(theirs["norm_out.linear.weight"], 2)
    assert_same_bits(
        tensors["final_layer.adaLN_modulation.1.weight"], np.concatenate([shift, scale])
    )
    assert "single_blocks.0.norm.key_norm.scale" in tensors
    assert len(tensors) == 2 * len(flux_modules(config)) - 6 * 2  # norms have no bias


@BOTH
def test_names_of_diffusers_and_other_components_in_the_file_are_read_too(
    tmp_path, random_params, name
):
    config = CONFIGS[name]
    params = random_params(config, BFLOAT16)
    theirs = flux_to_torch(params, config)
    other = {"vae.decoder.conv_in.weight": np.zeros((2, 2), np.float32)}
    for tensors in (theirs, flux_to_original(theirs, config)):
        contiguous = {key: np.ascontiguousarray(x) for key, x in tensors.items()}
        save_file({**contiguous, **other}, tmp_path / "flux.safetensors")
        found, back = read_flux_file(tmp_path / "flux.safetensors", place=np.asarray)
        assert found == config
        assert_same_bits(back, params)


def test_damaged_files_are_refused_by_name(tmp_path, random_params):
    config, file = CONFIGS["klein"], tmp_path / "flux.safetensors"
    whole = flux_to_original(flux_to_torch(random_params(config, BFLOAT16), config), config)
    whole = {key: np.ascontiguousarray(x) for key, x in whole.items()}
    wide = np.zeros((16, 16), BFLOAT16)
    for changes, message in (
        ({"img_in.weight": None}, "lacks img_in.weight: expected the tensors of a FLUX"),
        ({"single_blocks.1.linear2.weight": None}, "missing tensors: single_transformer_blocks.1"),
        ({"double_blocks.0.img_attn.q.weight": wide}, "unexpected tensors: double_blocks.0.img_"),
        (
            dict.fromkeys(name for name in whole if name.startswith("single_blocks.")),
            "missing tensors: single_transformer_blocks.0",
        ),
        ({"txt_in.bias": wide[0]}, "unexpected tensors: context_embedder.bias"),
        ({"double_blocks.0.img_attn.qkv.weight": wide}, "tensors of another shape"),
        ({"final_layer.linear.weight": wide}, "8 input and 16 output channels"),
        ({"double_blocks.0.img_attn.qkv.weight": None}, "holds no FLUX transformer: expected"),
        ({"double_blocks.2000000000.x": wide}, "numbers double_blocks beyond 255: expected at m"),
        ({f"single_blocks.{'9' * 5000}.x": wide}, "numbers single_blocks beyond 255: expected"),
        ({"double_blocks.0.img_attn.norm.query_norm.scale": wide[0, :0]}, "lacks double_blocks"),
        ({"img_in.weight": wide[:0]}, "lacks img_in.weight"),
        ({"double_blocks.0.img_attn.qkv.weight": np.zeros((), BFLOAT16)}, "of another sh"),
    ):
        tensors = {key: x for key, x in {**whole, **changes}.items() if x is not None}
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            read_flux_file(file)


def test_quantised_weights_are_refused(tmp_path, random_params):
    config, file = CONFIGS["klein"], tmp_path / "flux.safetensors"
    whole = flux_to_original(flux_to_torch(random_params(config, BFLOAT16), config), config)
    save_file({k: x.astype(ml_dtypes.float8_e4m3fn) for k, x in whole.items()}, file)
    with pytest.raises(UserError, match="is of type F8_E4M3: expected one of F64, F32"):
        read_flux_file(file)


def test_a_structure_that_nothing_published_has_is_not_written(tmp_path, random_params):
    config = dataclasses.replace(CONFIGS["klein"], bias=True)
    with pytest.raises(UserError, match=r"neither a FLUX\.1 nor a FLUX\.2"):
        write_flux_file(tmp_path / "x.safetensors", random_params(config, BFLOAT16), config)
    assert list(tmp_path.iterdir()) == []


def test_a_file_gives_the_denoiser_of_a_model_but_no_whole_model(tmp_path, random_params):
    config, file = CONFIGS["klein"], str(tmp_path / "flux.safetensors")
    params = random_params(config, BFLOAT16)
    write_flux_file(file, params, config, "model.diffusion_model.")
    abstract = abstract_params(bind_build(config))
    found = read_parts({0: PartSource(file, ("denoiser",), abstract)})[0]
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.float32, params))
    with pytest.raises(UserError, match="without the text encoders and tokenizers"):
        load_bundle(file)
    with pytest.raises(UserError, match="without the text encoders and tokenizers"):
        read_parts({0: PartSource(file, ("autoencoder",), abstract)})
    wider = abstract_params(bind_build(dataclasses.replace(config, channels=4)))
    with pytest.raises(UserError, match="patch"):
        read_parts({0: PartSource(file, ("denoiser",), wider)})
