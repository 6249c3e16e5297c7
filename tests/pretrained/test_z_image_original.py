"""Z-Image's transformer in the original layout: every tensor returns bit for bit."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.z_image import ZImageConfig
from jaxdiff.pretrained.z_image_keys import z_image_to_torch
from jaxdiff.pretrained.z_image_original import (
    read_z_image_file,
    write_z_image_file,
    z_image_to_original,
)
from tests.pretrained.same_bits import assert_same_bits

BFLOAT16 = ml_dtypes.bfloat16
CONFIG = ZImageConfig(
    channels=4, heads=2, depth=3, refiner_depth=1, text_width=8, rope_axes=(4, 6, 6)
)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_written_file_is_read_bit_for_bit_and_states_its_config(tmp_path, random_params, prefix):
    params, file = random_params(CONFIG, BFLOAT16), tmp_path / "z_image.safetensors"
    write_z_image_file(file, params, CONFIG, prefix)
    found, back = read_z_image_file(file, place=np.asarray)
    assert found == CONFIG
    assert_same_bits(back, params)
    again = tmp_path / "again.safetensors"
    write_z_image_file(again, back, found, prefix)
    assert again.read_bytes() == file.read_bytes()


def test_names_and_order_of_rows_are_those_of_the_original_code(tmp_path, random_params):
    params, file = random_params(CONFIG, BFLOAT16), tmp_path / "z_image.safetensors"
    write_z_image_file(file, params, CONFIG)
    tensors, theirs = load_file(file), z_image_to_torch(params)
    qkv = [theirs[f"layers.2.attention.to_{x}.weight"] for x in "qkv"]
    assert_same_bits(tensors["layers.2.attention.qkv.weight"], np.concatenate(qkv))
    for name in (
        "x_embedder.bias",
        "final_layer.adaLN_modulation.1.weight",
        "context_refiner.0.attention.q_norm.weight",
        "noise_refiner.0.attention.out.weight",
        "x_pad_token",
        "t_embedder.mlp.2.bias",
    ):
        assert name in tensors
    assert not [name for name in tensors if "all_" in name or ".to_" in name]


def test_names_of_diffusers_and_other_tensors_in_the_file_are_read_too(tmp_path, random_params):
    params, file = random_params(CONFIG, BFLOAT16), tmp_path / "z_image.safetensors"
    theirs = z_image_to_torch(params)
    other = {"vae.decoder.conv_in.weight": np.zeros((2, 2), np.float32)}
    unused = {"norm_final.weight": np.ones(32, np.float32)}
    for tensors in (theirs, z_image_to_original(theirs, CONFIG) | unused):
        contiguous = {key: np.ascontiguousarray(x) for key, x in tensors.items()}
        save_file({**contiguous, **other}, file)
        found, back = read_z_image_file(file, place=np.asarray)
        assert found == CONFIG
        assert_same_bits(back, params)


def test_damaged_files_are_refused_by_name(tmp_path, random_params):
    file = tmp_path / "z_image.safetensors"
    whole = z_image_to_original(z_image_to_torch(random_params(CONFIG, BFLOAT16)), CONFIG)
    whole = {key: np.ascontiguousarray(x) for key, x in whole.items()}
    wide = np.zeros((24, 24), BFLOAT16)
    for changes, message in (
        ({"x_embedder.weight": None}, "lacks x_embedder.weight: expected the tensors of a Z-Image"),
        ({"layers.1.attention.qkv.weight": None}, r"missing tensors: layers\.1\.attention\.to_k"),
        ({"layers.0.attention.to_q.bias": wide[0]}, "unexpected tensors: layers.0.attention.to_q"),
        ({"layers.0.feed_forward.w1.weight": wide}, "tensors of another shape"),
        ({"noise_refiner.0.attention.q_norm.weight": wide[0]}, "heads of 24 channels of 32"),
        ({"noise_refiner.0.attention.qkv.weight": None}, "holds no Z-Image transformer: expected"),
        ({"layers.2000000000.x": wide}, "numbers layers beyond 255: expected at most 256"),
        ({"noise_refiner.0.attention.q_norm.weight": wide[0, :0]}, "lacks noise_refiner.0.attent"),
    ):
        tensors = {key: x for key, x in {**whole, **changes}.items() if x is not None}
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            read_z_image_file(file)
