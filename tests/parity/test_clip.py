"""The same random weights, saved by transformers and read by jaxdiff, give the same features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.models.layers import any_rngs, bind_init, bind_params
from jaxdiff.models.text_encoders.clip import (
    Clip,
    ClipConfig,
    ClipText,
    ClipTextConfig,
    ClipVision,
    ClipVisionConfig,
    normalize_for_clip,
)
from jaxdiff.pretrained import clip_keys
from jaxdiff.pretrained.load import load_bundle

torch = pytest.importorskip("torch")

from tests.parity.torch_models import randomized

pytestmark = pytest.mark.parity

END = 49
IDS = np.array(
    [[48, 7, 3, 9, END, 0, 0, 0], [48, 5, END, 0, 0, 0, 0, 0], [48, 1, 2, 3, 4, 5, 6, END]]
)
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}

# transformers' arguments, then ours: OpenAI's, whose configs give the wrong end id 2; OpenCLIP's.
TEXT_VARIANTS = [
    (
        {"hidden_act": "quick_gelu", "intermediate_size": 128, "eos_token_id": 2},
        {"activation": "quick_gelu", "end_id": None},
    ),
    (
        {"hidden_act": "gelu", "intermediate_size": 96, "eos_token_id": END, "projection_dim": 24},
        {"activation": "gelu", "mlp_ratio": 3.0, "end_id": END, "projection_dim": 24},
    ),
]
VISION_VARIANTS = [
    (
        {"hidden_act": "quick_gelu", "intermediate_size": 128, "patch_size": 8},
        {"activation": "quick_gelu", "patch_size": 8},
    ),
    (
        {"hidden_act": "gelu", "intermediate_size": 96, "patch_size": 4, "projection_dim": 24},
        {"activation": "gelu", "mlp_ratio": 3.0, "patch_size": 4, "projection_dim": 24},
    ),
]


def torch_text_config(**variant):
    return transformers.CLIPTextConfig(
        vocab_size=50,
        max_position_embeddings=8,
        bos_token_id=48,
        pad_token_id=0,
        **SIZES,
        **variant,
    )


def text_config(**variant) -> ClipTextConfig:
    return ClipTextConfig(vocab_size=50, length=8, width=32, depth=3, heads=4, **variant)


def torch_vision_config(**variant):
    return transformers.CLIPVisionConfig(image_size=16, **SIZES, **variant)


def vision_config(**variant) -> ClipVisionConfig:
    return ClipVisionConfig(image_size=16, width=32, depth=3, heads=4, **variant)


def randomize(model):
    """Every parameter, biases and norms too, so that none can be mistaken for another."""
    torch.manual_seed(0)
    return randomized(model, 0.2)


def load(network, config, model, folder):
    """Our network with the weights of theirs, by way of the file that transformers writes."""
    model.save_pretrained(folder)
    params = clip_keys.clip_from_torch(load_file(folder / "model.safetensors"), config)
    ours = nnx.eval_shape(lambda: network(config, rngs=any_rngs()))
    nnx.update(ours, jax.tree.map(jnp.asarray, params))
    return ours


def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)


def pixel_values():
    pixels = np.asarray(normalize_for_clip(jnp.asarray(images())))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("theirs", "ours"), TEXT_VARIANTS, ids=["openai", "openclip"])
def test_text_encoder(theirs, ours, tmp_path):
    projects = "projection_dim" in theirs
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    model = randomize(kind(torch_text_config(**theirs)))
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS), output_hidden_states=True)
    encoder = load(ClipText, text_config(**ours), model, tmp_path)

    ids = jnp.asarray(IDS)
    features = encoder(ids)
    assert_close(features.tokens, expected.last_hidden_state)
    assert_close(features.pooled, expected.text_embeds if projects else expected.pooler_output)
    np.testing.assert_array_equal(features.mask.sum(axis=1), (IDS == END).argmax(axis=1) + 1)
    assert len(expected.hidden_states) == 4
    for layer, state in enumerate(expected.hidden_states):
        assert_close(encoder(ids, hidden_layer=layer, final_norm=False).tokens, state)
    xl = encoder(ids, hidden_layer=-2, final_norm=False).tokens
    assert_close(xl, expected.hidden_states[-2])


def test_clip_skip_is_an_earlier_layer_after_the_final_norm(tmp_path):
    theirs, ours = TEXT_VARIANTS[0]
    model = randomize(transformers.CLIPTextModel(torch_text_config(**theirs)))
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS), output_hidden_states=True).hidden_states[-2]
        expected = model.final_layer_norm(expected)
    encoder = load(ClipText, text_config(**ours), model, tmp_path)
    assert_close(encoder(jnp.asarray(IDS), hidden_layer=-2).tokens, expected)


@pytest.mark.parametrize(("theirs", "ours"), VISION_VARIANTS, ids=["openai", "openclip"])
def test_vision_encoder(theirs, ours, tmp_path):
    projects = "projection_dim" in theirs
    kind = transformers.CLIPVisionModelWithProjection if projects else transformers.CLIPVisionModel
    model = randomize(kind(torch_vision_config(**theirs)))
    with torch.no_grad():
        expected = model(pixel_values(), output_hidden_states=True)
    encoder = load(ClipVision, vision_config(**ours), model, tmp_path)

    features = encoder(jnp.asarray(images()))
    assert_close(features.tokens, expected.last_hidden_state)
    assert_close(features.pooled, expected.image_embeds if projects else expected.pooler_output)
    assert len(expected.hidden_states) == 4
    for layer, state in enumerate(expected.hidden_states):
        assert_close(encoder(jnp.asarray(images()), layer=layer).tokens, state)


@pytest.mark.parametrize("variant", [0, 1], ids=["openai", "openclip"])
def test_both_encoders_and_the_scale(variant, tmp_path):
    (text, our_text), (vision, our_vision) = TEXT_VARIANTS[variant], VISION_VARIANTS[variant]
    joint = {"projection_dim": 24}
    config = transformers.CLIPConfig(
        text_config=torch_text_config(**(text | joint)).to_dict(),
        vision_config=torch_vision_config(**(vision | joint)).to_dict(),
        **joint,
    )
    model = randomize(transformers.CLIPModel(config))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(IDS), pixel_values=pixel_values())
    sizes = ClipConfig(
        text=text_config(**(our_text | joint)), vision=vision_config(**(our_vision | joint))
    )
    out = load(Clip, sizes, model, tmp_path)(jnp.asarray(images()), jnp.asarray(IDS))

    assert_close(out.image, expected.image_embeds)
    assert_close(out.text, expected.text_embeds)
    assert_close(out.logit_scale * out.image @ out.text.T, expected.logits_per_image)


def test_our_tensors_load_into_transformers(tmp_path):
    theirs, ours = TEXT_VARIANTS[1]
    encoder = ClipText(text_config(**ours), rngs=nnx.Rngs(3))
    params = nnx.to_pure_dict(nnx.state(encoder))
    tensors = clip_keys.clip_to_torch(params, text_config(**ours))
    model = transformers.CLIPTextModelWithProjection(torch_text_config(**theirs)).eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS))
    assert_close(encoder(jnp.asarray(IDS)).pooled, expected.text_embeds)


def test_a_whole_clip_from_its_folder(tmp_path):
    tokenizer = Tokenizer.train(["a red pea", "a green banana"] * 9, vocab_size=540)
    end = {"eos_token_id": tokenizer.end_id, "bos_token_id": tokenizer.start_id}
    sizes = {**SIZES, "intermediate_size": 64}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": tokenizer.vocab_size, **end},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    model = randomize(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    tokenizer.export(str(tmp_path))
    bundle = load_bundle(tmp_path)
    prompts = ["a red pea", "a green banana and a pea"]
    clip = bind_params(bind_init(Clip, bundle.spec), bundle.params)
    found = clip(jnp.asarray(images()), jnp.asarray(bundle.tokenizers["text"](prompts)))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    inputs = theirs(prompts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs, pixel_values=pixel_values())
    assert_close(found.image, expected.image_embeds)
    assert_close(found.text, expected.text_embeds)
