"""LoRA files for FLUX of every trainer change the weights as diffusers changes them."""

import functools
import json

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
RANK = 4


def torch_flux(first: bool):
    torch.manual_seed(0)
    if first:
        return diffusers.FluxTransformer2DModel(**FIRST).eval()
    return diffusers.Flux2Transformer2DModel(**SECOND).eval()


def tensors_of(model):
    """Weights, also of a model with fused adapters."""
    return {
        name.replace(".base_layer.", "."): x.detach().numpy()
        for name, x in model.state_dict().items()
        if ".lora_" not in name
    }


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


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def linear_layers(first: bool):
    model = torch_flux(first)
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def pairs(sizes, down, up, *, alpha=None):
    """Random adapters by name, for layers of (outputs, inputs)."""
    tensors = {}
    for i, (name, (outputs, inputs)) in enumerate(sizes.items()):
        tensors[f"{name}.{down}.weight"] = 0.3 * random(RANK, inputs, seed=2 * i)
        tensors[f"{name}.{up}.weight"] = 0.3 * random(outputs, RANK, seed=2 * i + 1)
        if alpha is not None and "final_layer" not in name:  # which diffusers ignores there
            tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    return tensors


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
    """Compare our merged weights; `changed` are the parts of names whose weights differ."""
    spec, params = ours(first)
    merged = merge_adapters(params, read_lora(file, spec)["denoiser"])
    found = flux_keys.flux_to_torch(jax.device_get(merged), spec.denoiser)
    before = tensors_of(torch_flux(first))
    assert found.keys() == wanted.keys()
    moved = {name for name in wanted if np.abs(wanted[name] - before[name]).max() > 1e-3}
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-5, err_msg=name)
    assert len(moved) == changed


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


@BOTH
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."], ids=["kohya", "comfyui"])
def test_files_of_kohya(tmp_path, first, prefix):
    import re

    sizes = {k: x for k, x in original_sizes(first).items() if not re.search(SKIPPED[first], k)}
    if prefix == "diffusion_model." and not first:
        return  # as ai-toolkit writes them, which the next test checks
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
    spec, params = ours(first)
    layers = linear_layers(first)
    sizes = {f"transformer.{name}": layer.weight.shape for name, layer in layers.items()}
    save_file(pairs(sizes, "lora_A", "lora_B"), tmp_path / "lora.safetensors")
    adapters = read_lora(tmp_path / "lora.safetensors", spec)
    write_lora(tmp_path / "written.safetensors", adapters, spec)
    model = torch_flux(first)
    model.load_lora_adapter(str(tmp_path / "written.safetensors"), prefix="transformer")
    model.fuse_lora()
    check(first, tmp_path / "lora.safetensors", tensors_of(model), len(layers))
    del params


@pytest.mark.parametrize("first", [True])
def test_configs_in_the_metadata_state_the_scale(tmp_path, first):
    layer = linear_layers(first)["proj_out"]
    tensors = pairs({"transformer.proj_out": layer.weight.shape}, "lora_A", "lora_B")
    metadata = {"transformer.r": RANK, "transformer.lora_alpha": 8}
    save_file(
        tensors,
        tmp_path / "lora.safetensors",
        metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata)},
    )
    tensors["transformer.proj_out.lora_B.weight"] *= 2
    check(first, tmp_path / "lora.safetensors", theirs(first, tensors), 1)
