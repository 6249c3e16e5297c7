"""Adapters for Z-Image: of fused layers, and of other models."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.models.denoisers.z_image import ZImageConfig
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.lora import read_lora

TEXT = ClipTextConfig(vocab_size=64, width=24, depth=1, heads=2, projection_dim=20)
SPEC = TextToImage(
    denoiser=ZImageConfig(
        channels=3, heads=2, depth=2, refiner_depth=1, text_width=24, rope_axes=(4, 6, 6)
    ),
    conditioner=ClipConditioner(text=ClipTextEncoder(model=TEXT), masked=False),
    prediction="velocity",
    schedule=RectifiedFlow(),
    image_size=16,
)


def pair(name, outputs, inputs=32):
    rng = np.random.default_rng(0)
    shapes = {"lora_down.weight": (4, inputs), "lora_up.weight": (outputs, 4)}
    return {f"{name}.{end}": rng.normal(size=x).astype(np.float32) for end, x in shapes.items()}


def test_a_fused_layer_changes_queries_keys_and_values(tmp_path):
    tensors = pair("lora_unet_layers_1_attention_qkv", 96)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = read_lora(tmp_path / "lora.safetensors", SPEC)["denoiser"]
    assert set(found) == {("blocks", "attention", x) for x in "qkv"}
    down, up = tensors.values()
    for x, rows in zip("qkv", np.split(up, 3), strict=True):
        adapter = found["blocks", "attention", x]
        assert not adapter.up[0].any()
        np.testing.assert_allclose(adapter.down[1] @ adapter.up[1], (rows @ down).T, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", (96,), "as of FLUX, such as"),
        ("lora_unet_down_blocks_0_attn", (8,), "as of Stable Diffusion 1, 2"),
        ("diffusion_model.layers.9.attention.to_q", (32,), "as of Z-Image, such as"),
        ("diffusion_model.layers.1.attention.to_q", (48,), "48"),
    ],
)
def test_adapters_for_another_model_are_refused(tmp_path, name, sizes, message):
    save_file(pair(name, *sizes), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "lora.safetensors", SPEC)
