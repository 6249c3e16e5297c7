"""LoRA files for FLUX of every trainer change the weights as diffusers changes them."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.models.denoisers.flux import FluxConfig
from jaxdiff.models.lora import merge_adapters
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained import flux_keys
from jaxdiff.pretrained.flux_original import flux_modules
from jaxdiff.pretrained.lora import read_lora, write_lora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from tests.parity.lora_files import RANK, check_merged, pairs, random, tensors_of

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


def spec_of(config: FluxConfig) -> TextToImage:
    text = ClipTextConfig(vocab_size=64, width=24, depth=1, heads=2, projection_dim=20)
    return TextToImage(
        denoiser=config,
        conditioner=ClipConditioner(text=ClipTextEncoder(model=text), masked=False),
        prediction="velocity",
        schedule=RectifiedFlow(),
        image_size=16,
    )


def linear_layers(first: bool):
    model = torch_flux(first)
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def original_sizes(first: bool):
    """(outputs, inputs) of the original code's linear layers."""
    layers, sizes = linear_layers(first), {}
    for old, pieces in flux_modules(ours(first)[0].denoiser).items():
        found = [layers[new].weight.shape for new, _ in pieces if new in layers]
        if found:
            sizes[old] = (sum(outputs for outputs, _ in found), found[0][1])
    return sizes


def theirs(first: bool, tensors):
    """Weights that diffusers merges with the adapters of a file."""
    pipeline = diffusers.FluxPipeline if first else diffusers.Flux2Pipeline
    given = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    converted = pipeline.lora_state_dict(given)
    converted = converted[0] if isinstance(converted, tuple) else converted
    model = torch_flux(first)
    converted = {
        name if name.startswith("transformer.") else f"transformer.{name}": x
        for name, x in converted.items()
    }
    model.load_lora_adapter(converted, prefix="transformer")
    model.fuse_lora()
    return tensors_of(model)


def check(first: bool, file, wanted, changed):
    """Compare our merged weights; `changed` counts those that differ."""
    spec, params = ours(first)
    merged = merge_adapters(params, read_lora(file, spec)["denoiser"])
    found = flux_keys.flux_to_torch(jax.device_get(merged), spec.denoiser)
    check_merged(found, wanted, tensors_of(torch_flux(first)), changed)


BOTH = pytest.mark.parametrize("first", [True, False], ids=["FLUX.1", "FLUX.2"])


@BOTH
def test_files_of_diffusers(tmp_path, first):
    """ai-toolkit writes the same for FLUX.1."""
    layers = linear_layers(first)
    sizes = {f"transformer.{name}": layer.weight.shape for name, layer in layers.items()}
    tensors = pairs(sizes, "lora_A", "lora_B")
    save_file(tensors, tmp_path / "lora.safetensors")
    check(first, tmp_path / "lora.safetensors", theirs(first, tensors), len(layers))


@BOTH
def test_files_of_peft(tmp_path, first):
    names = [x for x in linear_layers(first) if "attn" in x or "linear_in" in x or "proj_mlp" in x]
    config = peft.LoraConfig(
        target_modules=names, r=RANK, lora_alpha=2, init_lora_weights=False, use_rslora=True
    )
    model = peft.get_peft_model(torch_flux(first), config)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    wanted = tensors_of(model.get_base_model())
    check(first, tmp_path / "adapter_model.safetensors", wanted, len(names))


SKIPPED = {
    # diffusers knows only the published width of FLUX.1's, and does not read or swap the others.
    True: r"linear1",
    False: r"guidance_in|modulation",
}


@pytest.mark.parametrize(
    ("first", "prefix"),
    # FLUX.2's in ComfyUI's spelling are those of ai-toolkit, which the next test checks.
    [(True, "lora_unet_"), (True, "diffusion_model."), (False, "lora_unet_")],
    ids=["FLUX.1 kohya", "FLUX.1 comfyui", "FLUX.2 kohya"],
)
def test_files_of_kohya(tmp_path, first, prefix):
    sizes = {k: x for k, x in original_sizes(first).items() if not re.search(SKIPPED[first], k)}
    flat = prefix == "lora_unet_"
    named = {prefix + (k.replace(".", "_") if flat else k): x for k, x in sizes.items()}
    tensors = pairs(named, "lora_down", "lora_up", alpha=3.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    if not flat:  # diffusers expects underscores after the prefix
        tensors = {
            "lora_unet_" + re.sub(r"\.(?!lora_|alpha|weight)", "_", k.removeprefix(prefix)): x
            for k, x in tensors.items()
        }
    modules = flux_modules(ours(first)[0].denoiser)
    changed = sum(len(modules[name]) for name in sizes)
    check(first, tmp_path / "lora.safetensors", theirs(first, tensors), changed)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model."])
def test_files_of_ai_toolkit_for_the_second_generation(tmp_path, prefix):
    sizes = original_sizes(False)
    del sizes["final_layer.adaLN_modulation.1"]  # whose halves diffusers leaves as they are
    tensors = pairs({prefix + k: x for k, x in sizes.items()}, "lora_A", "lora_B")
    save_file(tensors, tmp_path / "lora.safetensors")
    modules = flux_modules(ours(False)[0].denoiser)
    changed = sum(len(modules[name]) for name in sizes)
    check(False, tmp_path / "lora.safetensors", theirs(False, tensors), changed)


def test_the_fused_layer_of_published_width(tmp_path):
    """diffusers splits it at 3072 alone; the products with a vector stand for the weights."""
    tensors = pairs({"lora_unet_single_blocks_0_linear1": (7 * 3072, 3072)}, "lora_down", "lora_up")
    tensors["lora_unet_single_blocks_0_linear1.alpha"] = np.array(1, np.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    config = flux_keys.read_flux1_config({"num_layers": 1, "num_single_layers": 1})
    config = FluxConfig(**{**vars(config), "channels": 3, "text_width": 24, "pooled_width": 20})
    found = read_lora(tmp_path / "lora.safetensors", spec_of(config))["denoiser"]
    given = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    wanted = diffusers.FluxPipeline.lora_state_dict(given)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
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
    layers = linear_layers(first)
    sizes = {f"transformer.{name}": layer.weight.shape for name, layer in layers.items()}
    save_file(pairs(sizes, "lora_A", "lora_B"), tmp_path / "lora.safetensors")
    adapters = read_lora(tmp_path / "lora.safetensors", spec)
    write_lora(tmp_path / "written.safetensors", adapters, spec)
    model = torch_flux(first)
    model.load_lora_adapter(str(tmp_path / "written.safetensors"), prefix="transformer")
    model.fuse_lora()
    check(first, tmp_path / "lora.safetensors", tensors_of(model), len(layers))


def test_configs_in_the_metadata_state_the_scale(tmp_path):
    layer = linear_layers(True)["proj_out"]
    tensors = pairs({"transformer.proj_out": layer.weight.shape}, "lora_A", "lora_B")
    metadata = {"transformer.r": RANK, "transformer.lora_alpha": 8}
    save_file(
        tensors,
        tmp_path / "lora.safetensors",
        metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata)},
    )
    tensors["transformer.proj_out.lora_B.weight"] *= 2
    check(True, tmp_path / "lora.safetensors", theirs(True, tensors), 1)
