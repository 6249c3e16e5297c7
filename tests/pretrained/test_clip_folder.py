"""A CLIP as transformers has it: read back, scoring and guiding another model's images."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.models.text_encoders.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from jaxdiff.pipelines.auxiliary_models import clip_scores
from jaxdiff.pretrained import clip_keys
from jaxdiff.pretrained.load import load_bundle, read_spec, read_tokenizers
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.sampling.guidance.guidance import Guidance

PEA = "a small red pea"
SIZES = {"width": 32, "depth": 2, "heads": 4, "mlp_ratio": 2.0, "projection_dim": 24}
THEIRS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "bad_words_ids": [1],  # old files list every option of any model
    "temperature": 1.0,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red pea", "a green banana"] * 9, vocab_size=540)


@pytest.fixture(scope="module")
def model(tokenizer) -> ClipConfig:
    text = ClipTextConfig(vocab_size=tokenizer.vocab_size, length=16, end_id=None, **SIZES)
    return ClipConfig(text=text, vision=ClipVisionConfig(image_size=16, patch_size=8, **SIZES))


@pytest.fixture
def params(model):
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (0.3 * draw.normal(size=x.shape)).astype(np.float32),
        abstract_params(bind_init(Clip, model)),
    )


@pytest.fixture
def folder(tmp_path, tokenizer, model, params):
    root = tmp_path / "clip"
    tokenizer.export(str(root))
    stated = json.loads((root / "tokenizer_config.json").read_text()) | {"model_max_length": 16}
    (root / "tokenizer_config.json").write_text(json.dumps(stated))
    save_file(clip_keys.clip_to_torch(params, model), root / "model.safetensors")
    text = {"vocab_size": model.text.vocab_size, "max_position_embeddings": 16, "eos_token_id": 2}
    config = {
        "model_type": "clip",
        "projection_dim": 24,
        "text_config": THEIRS | {"hidden_size": 7},
        "text_config_dict": THEIRS | text,  # which counts
        "vision_config": THEIRS | {"image_size": 16, "patch_size": 8},
    }
    (root / "config.json").write_text(json.dumps(config))
    return root


def test_it_is_read_as_it_was_written(folder, model, params):
    bundle = load_bundle(folder)
    assert bundle.spec == read_spec(folder) == model
    jax.tree.map(np.testing.assert_array_equal, bundle.params, params)
    for tokenizers in (bundle.tokenizers, read_tokenizers(folder)):
        assert tokenizers["text"].length == 16


def test_it_scores_and_guides_the_images_of_another_model(folder, pipeline):
    free, steered = (
        pipeline([PEA] * 2, seeds=[1, 2], num_steps=2, guidance_scale=1, guidance=Guidance(clip=c))
        for c in (None, ClipGuidance(model=str(folder), scale=30.0))
    )
    before, after = (clip_scores(str(folder), images, [PEA] * 2) for images in (free, steered))
    assert (np.abs(before) <= 1).all()
    assert (after > before).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"num_channels": 4}}, "vision_config: num_channels is 4"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config: hidden_act is 'relu'"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "text_config: layer_norm_eps is 1e-06"),
    ],
)
def test_what_jaxdiff_does_not_have_is_refused(folder, changes, message):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"text_config": THEIRS, "text_config_dict": None}
    path.write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        load_bundle(folder)


def test_defaults_are_those_of_transformers():
    config = clip_keys.read_clip_config({"model_type": "clip"})
    assert dataclasses.asdict(config.vision) | {"patch_size": 32, "projection_dim": 512} == (
        dataclasses.asdict(config.vision)
    )
    assert (config.text.width, config.text.heads, config.vision.width) == (512, 8, 768)
