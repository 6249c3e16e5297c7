"""Adapters for FLUX.1, FLUX.2 klein and Z-Image trained here work in diffusers, and the reverse."""

import dataclasses

import numpy as np
import pytest

import jaxdiff
from jaxdiff.cli.export import ExportOptions, export_model
from jaxdiff.pipelines.lora import apply_lora
from jaxdiff.pretrained.load import read_spec
from jaxdiff.training.loop import train
from jaxdiff.training.optimizer import AdamW, ConstantLR

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from tests.parity.families import (
    GUIDANCE,
    STEPS,
    family,
    guidance,
    make_pipeline,
    noise,
    open_pipeline,
    sample_there,
)
from tests.training.families import recipe, write_photos

pytestmark = pytest.mark.parity

TARGETS = {
    "FLUX.1": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp"],
    "klein": ["to_q", "to_out.0", "ff.linear_in", "ff.linear_out", "to_qkv_mlp_proj"],
    "Z-Image": ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"],
}
PROMPT, SIDE = "a red pea", 32


@pytest.fixture(scope="module", params=GUIDANCE)
def model(request, tmp_path_factory):
    """The kind, the folder of its pipeline, and diffusers' image without adapters."""
    root = tmp_path_factory.mktemp("family")
    theirs = make_pipeline(request.param, root)
    theirs.save_pretrained(root / "theirs")
    return request.param, root / "theirs", there(theirs, request.param)


def there(pipeline, kind):
    latents, (settings, _) = noise(kind, SIDE, SIDE), guidance(kind)
    return sample_there(pipeline, kind, latents, prompt=[PROMPT], **settings)


def here(pipeline, kind):
    latents, (_, settings) = noise(kind, SIDE, SIDE), guidance(kind)
    return pipeline(
        PROMPT, latents=latents, num_steps=STEPS, size=(SIDE, SIDE), output="float", **settings
    )


def test_trained_here(model, tmp_path):
    kind, folder, without = model
    config = recipe(
        read_spec(folder), folder, write_photos(tmp_path / "photos"), whole=False, steps=2
    )
    fast = AdamW(learning_rate=0.1, schedule=ConstantLR(warmup_steps=0))
    train(dataclasses.replace(config, optimizer=fast), tmp_path / "run", log=lambda _: None)
    export_model(
        ExportOptions(run=str(tmp_path / "run"), out=str(tmp_path / "style"), format="lora")
    )
    theirs = open_pipeline(folder)
    theirs.load_lora_weights(tmp_path / "style")
    expected = there(theirs, kind)
    assert np.abs(expected - without).max() > 0.02
    found = here(jaxdiff.load(tmp_path / "run"), kind)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_trained_there(model, tmp_path):
    kind, folder, without = model
    theirs = open_pipeline(folder)
    torch.manual_seed(0)
    theirs.transformer.add_adapter(
        peft.LoraConfig(
            r=2, lora_alpha=4, target_modules=TARGETS[family(kind)], init_lora_weights=False
        )
    )
    with torch.no_grad():
        for name, value in theirs.transformer.named_parameters():
            if "lora_" in name:
                value.copy_(0.2 * torch.randn_like(value))
    layers = peft.get_peft_model_state_dict(theirs.transformer)
    config = theirs.transformer.peft_config["default"].to_dict()
    metadata = {key: sorted(x) if isinstance(x, set) else x for key, x in config.items()}
    type(theirs).save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
    )
    expected = there(theirs, kind)
    assert np.abs(expected - without).max() > 0.02
    found = here(apply_lora(jaxdiff.load(folder), tmp_path), kind)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
