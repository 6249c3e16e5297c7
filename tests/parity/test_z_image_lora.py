"""LoRA files for Z-Image of every trainer change the weights as diffusers changes them."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.pretrained import z_image_keys
from jaxdiff.pretrained.lora import read_lora, write_lora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from tests.parity.lora_files import (
    RANK,
    assert_same_weights,
    converted,
    linear_layers,
    merged_by_diffusers,
    merged_by_peft,
    merged_here,
    pairs,
    random,
    spec_of,
    tensors_of,
)

pytestmark = pytest.mark.parity

SMALL = {
    "in_channels": 3,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": [4, 6, 6],
}


def torch_z_image():
    torch.manual_seed(0)
    return diffusers.ZImageTransformer2DModel(**SMALL).eval()


@functools.cache
def ours():
    """A specification, and the denoiser's parameters."""
    model = torch_z_image()
    config = z_image_keys.read_z_image_config({**model.config})
    params = z_image_keys.z_image_from_torch(tensors_of(model), config, place=jnp.asarray)
    return spec_of(config), params


@functools.cache
def sizes():
    """(outputs, inputs) of diffusers' linear layers."""
    return linear_layers(torch_z_image())


def original_sizes():
    """(outputs, inputs) of the blocks' linear layers in the original code."""
    found = {}
    for name, (outputs, inputs) in sizes().items():
        if name.startswith(("all_", "cap_", "t_")):
            continue
        if name.endswith(".to_q"):
            found[name.replace("to_q", "qkv")] = 3 * outputs, inputs
        elif not name.endswith((".to_k", ".to_v")):
            found[name.replace("to_out.0", "out")] = outputs, inputs
    return found


def theirs(tensors):
    """Weights that diffusers merges with the adapters of a file."""
    return merged_by_diffusers(torch_z_image(), converted(diffusers.ZImagePipeline, tensors))


def check(file, wanted, changed):
    """Compare our merged weights; `changed` counts those that differ."""
    spec, params = ours()
    found = z_image_keys.z_image_to_torch(merged_here(params, file, spec))
    assert_same_weights(found, wanted, tensors_of(torch_z_image()), changed)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_files_of_diffusers_and_ai_toolkit(tmp_path, prefix):
    tensors = pairs({prefix + name: x for name, x in sizes().items()}, "lora_A", "lora_B")
    save_file(tensors, tmp_path / "lora.safetensors")
    check(tmp_path / "lora.safetensors", theirs(tensors), len(sizes()))


def test_files_of_peft(tmp_path):
    names = [name for name in sizes() if "attention" in name or "feed_forward" in name]
    wanted = merged_by_peft(torch_z_image(), names, tmp_path)
    check(tmp_path / "adapter_model.safetensors", wanted, len(names))


def kohya(layers):
    """Names of kohya's scripts."""
    return {f"lora_unet_{name.replace('.', '_')}": x for name, x in layers.items()}


def test_files_of_kohya(tmp_path):
    """By diffusers' names; diffusers does not read the embedders' there."""
    layers = {k: x for k, x in sizes().items() if "attention" in k or "feed_forward" in k}
    tensors = pairs(kohya(layers), "lora_down", "lora_up", alpha=3.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    check(tmp_path / "lora.safetensors", theirs(tensors), len(layers))


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."], ids=["kohya", "comfyui"])
def test_files_by_the_names_of_the_original_code(tmp_path, prefix):
    """diffusers reads fused layers only in another spelling of the two factors."""
    layers = original_sizes()
    named = kohya(layers) if prefix == "lora_unet_" else {prefix + k: x for k, x in layers.items()}
    save_file(pairs(named, "lora_down", "lora_up", alpha=3.0), tmp_path / "lora.safetensors")
    given = pairs(kohya(layers), "lora.down", "lora.up", alpha=3.0)
    check(tmp_path / "lora.safetensors", theirs(given), len(layers) + 2 * 4)


def test_kronecker_products_of_ai_toolkit(tmp_path):
    tensors = {}
    for i, (name, (outputs, inputs)) in enumerate(sizes().items()):
        if "attention" in name:
            layer = f"diffusion_model.{name}"
            tensors[f"{layer}.lokr_w1"] = random(2, 2, seed=3 * i)
            tensors[f"{layer}.lokr_w2_a"] = random(outputs // 2, RANK, seed=3 * i + 1)
            tensors[f"{layer}.lokr_w2_b"] = random(RANK, inputs // 2, seed=3 * i + 2)
            tensors[f"{layer}.alpha"] = np.array(2, np.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    check(tmp_path / "lora.safetensors", theirs(tensors), len(tensors) // 4)


def test_what_is_written_opens_in_diffusers(tmp_path):
    spec, _ = ours()
    tensors = pairs({f"transformer.{name}": x for name, x in sizes().items()}, "lora_A", "lora_B")
    save_file(tensors, tmp_path / "lora.safetensors")
    write_lora(
        tmp_path / "written.safetensors", read_lora(tmp_path / "lora.safetensors", spec), spec
    )
    wanted = merged_by_diffusers(torch_z_image(), str(tmp_path / "written.safetensors"))
    check(tmp_path / "lora.safetensors", wanted, len(sizes()))
