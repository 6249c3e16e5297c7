"""Adapters of the original code's modules, which hold several layers of FLUX."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.models.denoisers.flux import FLUX1, FluxConfig
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.models.lora import merge_adapters
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.flux_keys import flux_to_torch
from jaxdiff.pretrained.flux_original import flux_to_original
from jaxdiff.pretrained.lora import read_lora

SMALL = {"heads": 2, "head_width": 16, "double_depth": 1, "single_depth": 1, "text_width": 24}
CONFIGS = {
    "FLUX.1": dataclasses.replace(FLUX1, **SMALL, channels=3, pooled_width=20, rope_axes=(4, 6, 6)),
    "FLUX.2": FluxConfig(**SMALL, channels=3, rope_axes=(4, 4, 4, 4)),
}
BOTH = pytest.mark.parametrize("name", CONFIGS)


def spec_of(name) -> TextToImage:
    text = ClipTextConfig(vocab_size=64, width=24, depth=1, heads=2, projection_dim=20)
    return TextToImage(
        name=name,
        denoiser=CONFIGS[name],
        conditioner=ClipConditioner(text=ClipTextEncoder(model=text), masked=False),
        prediction="velocity",
        schedule=RectifiedFlow(),
        image_size=16,
    )


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights(name):
    params = abstract_params(bind_build(CONFIGS[name]))
    return jax.tree.map(lambda p: random(*p.shape), params)


def merged(name, file):
    """The original code's weights before and after."""
    params = weights(name)
    after = merge_adapters(params, read_lora(file, spec_of(name))["denoiser"])
    config = CONFIGS[name]
    return tuple(flux_to_original(flux_to_torch(x, config), config) for x in (params, after))


MODULES = {
    "FLUX.1": ["double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv"],
    "FLUX.2": ["double_blocks.0.txt_attn.qkv", "single_blocks.0.linear1"],
}
for name in MODULES:
    MODULES[name] += ["final_layer.adaLN_modulation.1", "single_blocks.0.linear2"]
MODULES["FLUX.1"].append("single_blocks.0.linear1")


def adapter(kind, outputs, inputs):
    """Tensors of one adapter, and the changed weight given the old one."""
    if kind == "LoKr":
        first, second = random(2, 4), random(outputs // 2, inputs // 4, seed=1)
        return {"lokr_w1": first, "lokr_w2": second}, lambda w: w + np.kron(first, second)
    down, up = random(4, inputs), random(outputs, 4, seed=1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(2, np.float32)}
    if kind == "LoRA":
        return tensors, lambda w: w + 0.5 * up @ down
    scale = random(outputs, 1, seed=2)

    def change(w):
        full = w + 0.5 * up @ down
        return full / np.linalg.norm(full, axis=1, keepdims=True) * scale

    return {**tensors, "dora_scale": scale}, change


@BOTH
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoKr"])
def test_a_module_changes_all_layers_that_it_holds(tmp_path, name, kind):
    original = flux_to_original(flux_to_torch(weights(name), CONFIGS[name]), CONFIGS[name])
    tensors, changes = {}, {}
    for module in MODULES[name]:
        found, changes[f"{module}.weight"] = adapter(kind, *original[f"{module}.weight"].shape)
        flat = module.replace(".", "_")
        tensors |= {f"lora_unet_{flat}.{end}": value for end, value in found.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    before, after = merged(name, tmp_path / "lora.safetensors")
    for key, value in after.items():
        change = changes.get(key)
        expected = before[key] if change is None else change(before[key])
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4, err_msg=key)


def save_pair(file, name, outputs, inputs):
    pair = {"lora_down.weight": random(4, inputs), "lora_up.weight": random(outputs, 4)}
    save_file({f"{name}.{end}": x for end, x in pair.items()}, file)


@pytest.mark.parametrize(
    ("name", "layer", "sizes", "message"),
    [
        (
            "FLUX.1",
            "lora_unet_down_blocks_0_attn",
            (8, 8),
            "as of Stable Diffusion 1, 2",
        ),
        ("FLUX.1", "diffusion_model.layers.0.attention.to_q", (8, 8), "as of Z-Image"),
        ("FLUX.2", "transformer.single_transformer_blocks.0.proj_mlp", (8, 8), r"as of FLUX\.1"),
        ("FLUX.1", "transformer.transformer_blocks.0.ff.linear_in", (8, 8), r"as of FLUX\.2"),
        ("FLUX.1", "lora_unet_joint_blocks_0_x", (8, 8), "as of Stable Diffusion 3"),
        ("FLUX.1", "lora_unet_double_blocks_7_img_attn_qkv", (96, 32), "as of FLUX, such as"),
        ("FLUX.2", "lora_unet_double_blocks_0_img_attn_qkv", (96, 48), "expected .*was trained on"),
    ],
)
def test_adapters_for_another_model_are_refused(tmp_path, name, layer, sizes, message):
    save_pair(tmp_path / "lora.safetensors", layer, *sizes)
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "lora.safetensors", spec_of(name))


def test_two_adapters_of_one_layer_are_refused(tmp_path):
    tensors = {
        "double_blocks.0.img_attn.qkv": (96, 32),
        "transformer_blocks.0.attn.to_k": (32, 32),
    }
    pairs = {
        f"diffusion_model.{name}.{end}.weight": random(*shape)
        for name, (outputs, inputs) in tensors.items()
        for end, shape in (("lora_A", (4, inputs)), ("lora_B", (outputs, 4)))
    }
    save_file(pairs, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="two tensors for one place"):
        read_lora(tmp_path / "lora.safetensors", spec_of("FLUX.2"))


def test_a_magnitude_of_the_inputs_of_several_layers_is_refused(tmp_path):
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors, _ = adapter("LoRA", 96, 32)
    tensors["dora_scale"] = random(1, 32)
    save_file({f"{module}.{end}": x for end, x in tensors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="has a dora_scale of its inputs"):
        read_lora(tmp_path / "lora.safetensors", spec_of("FLUX.1"))
