"""LoRA files for FLUX of every trainer change the weights as diffusers changes them."""

import dataclasses
import functools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.pretrained import flux_keys
from jaxdiff.pretrained.flux_original import flux_modules
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
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "guidance_embeds": True,
}
FIRST = {**SMALL, "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6)}
SECOND = {**SMALL, "in_channels": 3, "axes_dims_rope": (4, 4, 4, 4)}


def torch_flux(first: bool):
    torch.manual_seed(0)
    if first:
        return diffusers.FluxTransformer2DModel(**FIRST).eval()
    return diffusers.Flux2Transformer2DModel(**SECOND).eval()


@functools.cache
def ours(first: bool):
    """A specification, and the denoiser's parameters."""
    model = torch_flux(first)
    read = flux_keys.read_flux1_config if first else flux_keys.read_flux2_config
    config = read({**model.config})
    return spec_of(config), flux_keys.flux_from_torch(tensors_of(model), config, place=jnp.asarray)


@functools.cache
def sizes(first: bool):
    """(outputs, inputs) of diffusers' linear layers."""
    return linear_layers(torch_flux(first))


def original_sizes(first: bool):
    """(outputs, inputs) of the original code's linear layers."""
    layers, found = sizes(first), {}
    for old, pieces in flux_modules(ours(first)[0].denoiser).items():
        parts = [layers[new] for new, _ in pieces if new in layers]
        if parts:
            found[old] = (sum(outputs for outputs, _ in parts), parts[0][1])
    return found


def theirs(first: bool, tensors):
    """Weights that diffusers merges with the adapters of a file."""
    pipeline = diffusers.FluxPipeline if first else diffusers.Flux2Pipeline
    adapters = {
        f"transformer.{name.removeprefix('transformer.')}": x
        for name, x in converted(pipeline, tensors).items()
    }
    return merged_by_diffusers(torch_flux(first), adapters)


def check(first: bool, file, wanted, changed):
    """Compare our merged weights; `changed` counts those that differ."""
    spec, params = ours(first)
    found = flux_keys.flux_to_torch(merged_here(params, file, spec), spec.denoiser)
    assert_same_weights(found, wanted, tensors_of(torch_flux(first)), changed)


BOTH = pytest.mark.parametrize("first", [True, False], ids=["FLUX.1", "FLUX.2"])


@BOTH
def test_files_of_diffusers(tmp_path, first):
    """ai-toolkit writes the same for FLUX.1."""
    tensors = pairs({f"transformer.{k}": x for k, x in sizes(first).items()}, "lora_A", "lora_B")
    save_file(tensors, tmp_path / "lora.safetensors")
    check(first, tmp_path / "lora.safetensors", theirs(first, tensors), len(sizes(first)))


@BOTH
def test_files_of_peft(tmp_path, first):
    names = [x for x in sizes(first) if "attn" in x or "linear_in" in x or "proj_mlp" in x]
    wanted = merged_by_peft(torch_flux(first), names, tmp_path)
    check(first, tmp_path / "adapter_model.safetensors", wanted, len(names))


SKIPPED = {
    # diffusers knows only the published width of FLUX.1's, and does not read or swap the others.
    True: r"linear1",
    False: r"guidance_in|modulation",
}


@pytest.mark.parametrize(
    ("first", "prefix"),
    [(True, "lora_unet_"), (False, "lora_unet_"), (True, "diffusion_model.")],
    ids=["kohya FLUX.1", "kohya FLUX.2", "comfyui FLUX.1"],
)
def test_files_of_kohya(tmp_path, first, prefix):
    layers = {k: x for k, x in original_sizes(first).items() if not re.search(SKIPPED[first], k)}
    flat = prefix == "lora_unet_"
    named = {prefix + (k.replace(".", "_") if flat else k): x for k, x in layers.items()}
    tensors = {
        name: x
        for name, x in pairs(named, "lora_down", "lora_up", alpha=3.0).items()
        if not re.search(r"final_layer.*\.alpha", name)  # which diffusers ignores
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    if not flat:  # diffusers expects underscores after the prefix
        tensors = {
            "lora_unet_" + re.sub(r"\.(?!lora_|alpha|weight)", "_", k.removeprefix(prefix)): x
            for k, x in tensors.items()
        }
    modules = flux_modules(ours(first)[0].denoiser)
    changed = sum(len(modules[name]) for name in layers)
    check(first, tmp_path / "lora.safetensors", theirs(first, tensors), changed)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model."])
def test_files_of_ai_toolkit_for_the_second_generation(tmp_path, prefix):
    layers = original_sizes(False)
    del layers["final_layer.adaLN_modulation.1"]  # whose halves diffusers leaves as they are
    tensors = pairs({prefix + k: x for k, x in layers.items()}, "lora_A", "lora_B")
    save_file(tensors, tmp_path / "lora.safetensors")
    modules = flux_modules(ours(False)[0].denoiser)
    changed = sum(len(modules[name]) for name in layers)
    check(False, tmp_path / "lora.safetensors", theirs(False, tensors), changed)


def test_the_fused_layer_of_published_width(tmp_path):
    """diffusers splits it at 3072 alone; the products with a vector stand for the weights."""
    tensors = pairs({"lora_unet_single_blocks_0_linear1": (7 * 3072, 3072)}, "lora_down", "lora_up")
    tensors["lora_unet_single_blocks_0_linear1.alpha"] = np.array(1, np.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    config = flux_keys.read_flux1_config({"num_layers": 1, "num_single_layers": 1})
    config = dataclasses.replace(config, channels=3, text_width=24, pooled_width=20)
    found = read_lora(tmp_path / "lora.safetensors", spec_of(config))["denoiser"]
    wanted = converted(diffusers.FluxPipeline, tensors)
    vector = random(3072)
    places = {"q": "attn.to_q", "k": "attn.to_k", "v": "attn.to_v", "inner": "proj_mlp"}
    assert {path[-1] for path in found} == set(places)
    for (*_, ours), pair in found.items():
        name = f"transformer.single_transformer_blocks.0.{places[ours]}"
        a, b = (wanted[f"{name}.lora_{x}.weight"].numpy() for x in "AB")
        np.testing.assert_allclose(vector @ pair.down[0] @ pair.up[0], b @ (a @ vector), rtol=1e-3)


@BOTH
def test_what_is_written_opens_in_diffusers(tmp_path, first):
    spec, _ = ours(first)
    tensors = pairs({f"transformer.{k}": x for k, x in sizes(first).items()}, "lora_A", "lora_B")
    save_file(tensors, tmp_path / "lora.safetensors")
    write_lora(
        tmp_path / "written.safetensors", read_lora(tmp_path / "lora.safetensors", spec), spec
    )
    wanted = merged_by_diffusers(torch_flux(first), str(tmp_path / "written.safetensors"))
    check(first, tmp_path / "lora.safetensors", wanted, len(sizes(first)))


def test_configs_in_the_metadata_state_the_scale(tmp_path):
    tensors = pairs({"transformer.proj_out": sizes(True)["proj_out"]}, "lora_A", "lora_B")
    metadata = {"transformer.r": RANK, "transformer.lora_alpha": 8}
    save_file(
        tensors,
        tmp_path / "lora.safetensors",
        metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata)},
    )
    tensors["transformer.proj_out.lora_B.weight"] *= 2
    check(True, tmp_path / "lora.safetensors", theirs(True, tensors), 1)
