"""Autoencoders in single files: every tensor returns bit for bit."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.flux2 import Flux2AutoencoderConfig
from jaxdiff.pretrained.autoencoder_file import (
    is_autoencoder_file,
    read_autoencoder_file,
    read_autoencoder_file_spec,
    write_autoencoder_file,
)
from jaxdiff.pretrained.autoencoder_keys import autoencoder_to_torch
from jaxdiff.pretrained.bundle import Bundle, write_bundle
from jaxdiff.pretrained.load import load_bundle, read_spec
from jaxdiff.pretrained.presets import FLUX1_AUTOENCODER
from jaxdiff.pretrained.safetensors_io import to_device
from tests.pretrained.same_bits import assert_same_bits

SIZES = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
CONFIGS = {
    "FLUX.1": dataclasses.replace(FLUX1_AUTOENCODER, **SIZES),
    "FLUX.2": Flux2AutoencoderConfig(**SIZES, z_channels=4, decoder_block_out_channels=(4, 8)),
}
BOTH = pytest.mark.parametrize("name", CONFIGS)


def random(random_params, config):
    params = random_params(config, ml_dtypes.bfloat16)
    if "bn" in params:
        params["bn"]["num_batches_tracked"] = np.array(12_345, np.int32)
    return params


@BOTH
def test_a_written_file_is_read_bit_for_bit(tmp_path, random_params, name):
    config, file = CONFIGS[name], tmp_path / "ae.safetensors"
    params = random(random_params, config)
    write_autoencoder_file(file, params, config)
    assert is_autoencoder_file(file)
    for place in (np.asarray, to_device):
        found, back = read_autoencoder_file(file, config, place=place)
        assert found == config
        assert_same_bits(back, params)
    again = tmp_path / "again.safetensors"
    write_autoencoder_file(again, back, config)
    assert again.read_bytes() == file.read_bytes()


def test_counters_stay_integers_in_our_own_folders(tmp_path, random_params):
    config = CONFIGS["FLUX.2"]
    params = random(random_params, config)
    write_bundle(tmp_path, Bundle(config, params, {}), "bfloat16")
    found = load_bundle(tmp_path)
    assert found.spec == config
    as_floats = jax.tree.map(lambda x: x if x.dtype == np.int32 else x.astype(np.float32), params)
    assert_same_bits(found.params, as_floats)


def test_names_are_those_of_the_original_code(tmp_path, random_params):
    for name, config in CONFIGS.items():
        params = random(random_params, config)
        write_autoencoder_file(tmp_path / "ae.safetensors", params, config)
        tensors = load_file(tmp_path / "ae.safetensors")
        assert tensors["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
        assert "decoder.up.0.block.0.nin_shortcut.weight" in tensors
        assert "decoder.mid.attn_1.proj_out.bias" in tensors
        assert not [x for x in tensors if "_block" in x.replace("mid.block_", "")]
        own = [x for x in tensors if "quant_conv" in x or x.startswith("bn.")]
        halves = [
            f"{x}.{leaf}" for x in ("decoder.post", "encoder.") for leaf in ("bias", "weight")
        ]
        if name == "FLUX.1":
            assert own == []
            continue
        statistics = ["bn.num_batches_tracked", "bn.running_mean", "bn.running_var"]
        quant = [x.replace("decoder.post", "decoder.post_quant_conv") for x in halves]
        quant = [x.replace("encoder..", "encoder.quant_conv.") for x in quant]
        assert sorted(own) == sorted([*statistics, *quant])
        assert tensors["bn.num_batches_tracked"].dtype == np.int64


@BOTH
def test_names_of_diffusers_and_other_components_in_the_file_are_read_too(
    tmp_path, random_params, name
):
    config = CONFIGS[name]
    params = random(random_params, config)
    tensors = {
        f"vae.{k}": np.asarray(x, order="C") for k, x in autoencoder_to_torch(params).items()
    }
    tensors["transformer.x"] = np.zeros(2, np.float32)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    assert not is_autoencoder_file(file)
    _, back = read_autoencoder_file(file, config, place=np.asarray)
    assert_same_bits(back, params)


def shapes_of_published(tmp_path, latents, extra=()):
    file = tmp_path / "ae.safetensors"
    tensors = {"decoder.conv_in.weight": (8, latents, 3, 3), **dict(extra)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, file)
    return file


def test_the_published_autoencoders_differ_by_their_shapes(tmp_path):
    statistics = ("bn.running_mean", (128,))
    assert read_spec(shapes_of_published(tmp_path, 16)) == FLUX1_AUTOENCODER
    file = shapes_of_published(tmp_path, 32, [statistics])
    assert read_autoencoder_file_spec(file) == Flux2AutoencoderConfig()
    narrow = ("decoder.conv_out.weight", (3, 96, 3, 3))
    file = shapes_of_published(tmp_path, 32, [statistics, narrow])
    expected = Flux2AutoencoderConfig(decoder_block_out_channels=(96, 192, 384, 384))
    assert read_autoencoder_file_spec(file) == expected
    with pytest.raises(UserError, match=r"missing tensors: bn\.num_batches"):
        load_bundle(file)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="autoencoder of 4 latent channels: expected the 16"):
        read_autoencoder_file(shapes_of_published(tmp_path, 4))
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"holds no autoencoder: expected decoder\.conv_in\.weight"):
        read_autoencoder_file(tmp_path / "x.safetensors")
