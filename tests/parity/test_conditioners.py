"""Text is encoded as by `encode_prompt` of diffusers' pipelines, from the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxdiff.config.serialization import from_json, to_json
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.models.conditioners.flux1 import Flux1Conditioner
from jaxdiff.models.conditioners.flux2 import Flux2Conditioner
from jaxdiff.models.conditioners.z_image import ZImageConditioner
from jaxdiff.models.conditioning import ClipTextEncoder
from jaxdiff.models.text_encoders.qwen3 import Qwen3TextEncoder
from jaxdiff.models.text_encoders.t5 import T5TextEncoder
from jaxdiff.models.text_to_image import AnyConditioner
from jaxdiff.pretrained import clip_keys, qwen3_keys, t5_keys
from tests.data.language_tokenizers import TEXTS, write_qwen_tokenizer, write_t5_tokenizer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.parity.families import clip_text, qwen3, t5_encoder
from tests.parity.torch_models import randomized, tensors_of

pytestmark = pytest.mark.parity

LENGTH = 32
PROMPTS = ["a small red pea", "", "two green bananas, ripe. " * 9, "the  fox\n", None]
GIVEN = [prompt or "" for prompt in PROMPTS]


def encode(conditioner, networks, folders):
    """Encode the prompts after a round trip through JSON."""
    again = from_json(AnyConditioner, to_json(conditioner))
    assert again == conditioner
    tokenizers = {
        name: encoder.load_tokenizer(str(folders[name])) for name, encoder in again.encoders.items()
    }
    again.check_tokenizers(tokenizers)
    inputs = again.tokenize(tokenizers, PROMPTS)
    params = {"text_encoders": jax.tree.map(jnp.asarray, networks)}
    return jax.jit(again.encode)(params, inputs)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tokenizer's folder by the side of its padding, and a model."""
    folders = {
        side: write_qwen_tokenizer(tmp_path_factory.mktemp(side), padding_side=side)
        for side in ("right", "left")
    }
    torch.manual_seed(0)
    return folders, randomized(qwen3(vocab=320, width=32, depth=4), 0.1)


def our_qwen(model, layers, *, thinking):
    encoder = Qwen3TextEncoder(
        model=qwen3_keys.read_qwen3_config(model.config.to_dict()),
        hidden_layers=layers,
        max_length=LENGTH,
        thinking=thinking,
    )
    return encoder, qwen3_keys.qwen3_from_torch(tensors_of(model), encoder)


@pytest.mark.parametrize("side", ["right", "left"])
def test_flux2_klein(side, qwen):
    folders, model = qwen
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[side])
    pipeline = diffusers.Flux2KleinPipeline(
        scheduler=None, vae=None, text_encoder=model, tokenizer=tokenizer, transformer=None
    )
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            GIVEN, device="cpu", max_sequence_length=LENGTH, text_encoder_out_layers=(1, 2, 3)
        )
        absent, _ = pipeline.encode_prompt(
            None, device="cpu", max_sequence_length=LENGTH, text_encoder_out_layers=(1, 2, 3)
        )
    encoder, params = our_qwen(model, (1, 2, 3), thinking=False)
    cond = encode(Flux2Conditioner(text=encoder), {"text": params}, {"text": folders[side]})
    assert cond.mask is cond.pooled is None
    np.testing.assert_allclose(cond.tokens, expected.numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(cond.tokens[-1], absent[0].numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_z_image(side, qwen):
    folders, model = qwen
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[side])
    pipeline = diffusers.ZImagePipeline(
        scheduler=None, vae=None, text_encoder=model, tokenizer=tokenizer, transformer=None
    )
    with torch.no_grad():
        expected, negative = pipeline.encode_prompt(
            list(GIVEN), device="cpu", max_sequence_length=LENGTH
        )
    encoder, params = our_qwen(model, (3,), thinking=True)
    cond = encode(ZImageConditioner(text=encoder), {"text": params}, {"text": folders[side]})
    assert cond.pooled is None
    lengths = [len(tokens) for tokens in expected]
    assert len(set(lengths)) > 2
    np.testing.assert_array_equal(cond.mask, np.arange(LENGTH) < np.array(lengths)[:, None])
    for ours, theirs, count in zip(cond.tokens, expected, lengths, strict=True):
        np.testing.assert_allclose(ours[:count], theirs.numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(
        cond.tokens[-1, : len(negative[-1])], negative[-1].numpy(), atol=1e-4, rtol=0
    )


def test_flux1(tmp_path):
    folders = {"text": tmp_path / "clip", "text_2": write_t5_tokenizer(tmp_path / "t5")}
    tokenizer = Tokenizer.train(TEXTS, vocab_size=540)
    tokenizer.export(str(folders["text"]))
    clip_tokenizer = transformers.CLIPTokenizer.from_pretrained(folders["text"])
    torch.manual_seed(0)
    clip, t5 = (randomized(x, 0.1) for x in (clip_text(clip_tokenizer), t5_encoder(vocab=64)))
    pipeline = diffusers.FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=transformers.AutoTokenizer.from_pretrained(folders["text_2"]),
        transformer=None,
    )
    with torch.no_grad():
        expected, pooled, _ = pipeline.encode_prompt(
            GIVEN, device="cpu", max_sequence_length=LENGTH
        )
    text = ClipTextEncoder(model=clip_keys.read_text_config(clip.config.to_dict(), projected=False))
    text_2 = T5TextEncoder(model=t5_keys.read_t5_config(t5.config.to_dict()), max_length=LENGTH)
    networks = {
        "text": clip_keys.clip_from_torch(tensors_of(clip), text.model),
        "text_2": t5_keys.t5_from_torch(tensors_of(t5), text_2.model),
    }
    cond = encode(Flux1Conditioner(text=text, text_2=text_2), networks, folders)
    assert cond.mask is None
    np.testing.assert_allclose(cond.tokens, expected.numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(cond.pooled, pooled.numpy(), atol=1e-4, rtol=0)
