"""Conditioners: what a prompt, an empty prompt and an absent prompt become."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config.serialization import from_json, to_json
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.conditioners.flux1 import Flux1Conditioner
from jaxdiff.models.conditioners.flux2 import Flux2Conditioner
from jaxdiff.models.conditioners.z_image import ZImageConditioner
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    Conditioning,
    StableDiffusionXLConditioner,
    full_size_crop,
    mix,
)
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_encoders.qwen3 import Qwen3Config, Qwen3TextEncoder
from jaxdiff.models.text_encoders.t5 import T5Config, T5TextEncoder
from jaxdiff.models.text_to_image import AnyConditioner

LENGTH = 8
_SIZES = {"vocab_size": 530, "length": LENGTH, "depth": 2, "heads": 2}
TEXT = ClipTextEncoder(model=ClipTextConfig(width=8, **_SIZES), hidden_layer=-2, final_norm=False)
TEXT_2 = ClipTextEncoder(
    model=ClipTextConfig(width=12, projection_dim=6, **_SIZES), hidden_layer=-2, final_norm=False
)
T5 = T5TextEncoder(
    model=T5Config(vocab_size=530, width=10, depth=1, heads=2, head_dim=4, mlp_width=12),
    max_length=LENGTH + 2,
)
_HEADS = {"heads": 2, "kv_heads": 1, "head_dim": 6}
QWEN = Qwen3TextEncoder(
    model=Qwen3Config(vocab_size=530, width=8, depth=3, mlp_width=12, **_HEADS),
    hidden_layers=(1, 2),
    max_length=LENGTH,
)
CONDITIONERS = {
    "masked": ClipConditioner(text=ClipTextEncoder(model=TEXT.model)),
    "SD 1": ClipConditioner(text=ClipTextEncoder(model=TEXT.model), masked=False),
    "embeddings": ClipConditioner(text=ClipTextEncoder(model=TEXT.model, hidden_layer=0)),
    "XL": StableDiffusionXLConditioner(text=TEXT, text_2=TEXT_2),
    "refiner": StableDiffusionXLConditioner(text_2=TEXT_2),
    "XL that encodes the absent prompt": StableDiffusionXLConditioner(
        text=TEXT, text_2=TEXT_2, zero_absent=False
    ),
    "FLUX.1": Flux1Conditioner(text=ClipTextEncoder(model=TEXT.model), text_2=T5),
    "FLUX.2": Flux2Conditioner(text=QWEN),
    "Z-Image": ZImageConditioner(text=QWEN),
}
PROMPTS = ["a small red pea", "", None]


@pytest.fixture(params=CONDITIONERS)
def conditioner(request):
    return CONDITIONERS[request.param]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a small red pea", "two bananas"] * 5, vocab_size=530, length=LENGTH)


def tokenizers(conditioner, one=None):
    encoders = conditioner.encoders.items()
    return {name: encoder.adapt_tokenizer(one or tokenizer()) for name, encoder in encoders}


@functools.cache
def params_of(conditioner):
    rng = np.random.default_rng(0)

    def random(encoder):
        abstract = abstract_params(bind_init(type(encoder).build, encoder))
        return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), abstract)

    return {"text_encoders": {n: random(e) for n, e in conditioner.encoders.items()}}


@functools.cache
def encoder_of(conditioner):
    return jax.jit(conditioner.encode)


def encode(conditioner, prompts):
    inputs = conditioner.tokenize(tokenizers(conditioner), prompts)
    return encoder_of(conditioner)(params_of(conditioner), inputs), inputs


def test_encoded_text_has_the_widths_that_the_conditioner_states(conditioner):
    cond, inputs = encode(conditioner, PROMPTS)
    assert cond.tokens.shape == (3, conditioner.text_length, conditioner.text_width)
    widths = None if cond.pooled is None else cond.pooled.shape[1]
    assert widths == conditioner.pooled_width
    assert (cond.mask is not None) == conditioner.masked
    abstract = conditioner.abstract_inputs(3)
    assert jax.tree.structure(abstract) == jax.tree.structure(inputs)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), inputs) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )


def test_an_absent_prompt_is_zero_or_the_empty_one(conditioner):
    cond, _ = encode(conditioner, PROMPTS)
    for field in (cond.tokens, cond.pooled):
        if field is None:
            continue
        given, empty, absent = np.asarray(field)
        assert np.abs(given - empty).max() > 1e-3 or conditioner.encoders["text"].hidden_layer == 0
        assert np.abs(empty).max() > 1e-3
        if getattr(conditioner, "zero_absent", False):
            assert not absent.any()
        else:
            np.testing.assert_array_equal(absent, empty)


def test_packed_text_is_unpacked_to_the_same(conditioner):
    cond, inputs = encode(conditioner, PROMPTS)
    rows = conditioner.pack(cond)
    assert rows.shape == (3, conditioner.packed_size)
    found = jax.jit(conditioner.unpack)(rows, params_of(conditioner), inputs)
    assert jax.tree.structure(found) == jax.tree.structure(cond)
    jax.tree.map(np.testing.assert_array_equal, found, cond)


def test_unpacking_zeroes_absent_prompts_itself():
    """Cached rows of dropped captions are those of the empty caption."""
    conditioner = CONDITIONERS["XL"]
    cond, _ = encode(conditioner, ["", ""])
    inputs = conditioner.tokenize(tokenizers(conditioner), ["", None])
    found = conditioner.unpack(conditioner.pack(cond), params_of(conditioner), inputs)
    np.testing.assert_array_equal(found.tokens[0], cond.tokens[0])
    assert not np.any(found.tokens[1])
    assert not np.any(found.pooled[1])


def test_mixtures_at_both_ends_are_the_prompts(conditioner):
    """Tokens under the mask alone: no network reads the others."""
    a, _ = encode(conditioner, ["a small red pea", ""])
    b, _ = encode(conditioner, ["two bananas", "a pea"])
    for fraction, end in ((0.0, a), (1.0, b)):
        mixed = mix(a, b, jnp.full(2, fraction))
        if end.pooled is not None:
            np.testing.assert_allclose(mixed.pooled, end.pooled, rtol=1e-6)
        mask = np.ones(end.tokens.shape[:2], bool) if end.mask is None else np.asarray(end.mask)
        np.testing.assert_allclose(mixed.tokens[mask], end.tokens[mask], rtol=1e-6)
        if end.mask is not None:
            np.testing.assert_array_equal(mixed.mask, end.mask)


def test_a_mixture_is_linear_and_masks_join():
    tokens = jnp.ones((2, 3, 4))
    a = Conditioning(tokens, jnp.array([[True, False, False]] * 2), jnp.zeros((2, 5)))
    b = Conditioning(3 * tokens, jnp.array([[True, True, False]] * 2), jnp.ones((2, 5)))
    mixed = mix(a, b, jnp.array([0.25, 0.0]))
    np.testing.assert_allclose(mixed.pooled, [[0.25] * 5, [0.0] * 5])
    np.testing.assert_allclose(mixed.tokens[..., 0], [[1.5, 0.75, 0], [1, 0, 0]])
    np.testing.assert_array_equal(mixed.mask, [[True, True, False], [True, False, False]])


@pytest.mark.parametrize("name", ["SD 1", "XL", "refiner", "FLUX.1"])
def test_a_words_weight_moves_its_tokens_from_those_of_the_empty_prompt(name):
    conditioner = CONDITIONERS[name]
    prompts = [[("a small ", 1.0), ("red", 1.5), (" pea", 1.0)], [("two bananas", 1.0)]]
    inputs = conditioner.tokenize_weighted(tokenizers(conditioner), prompts)
    assert inputs.weights is not None
    found = encoder_of(conditioner)(params_of(conditioner), inputs)
    plain, _ = encode(conditioner, ["a small red pea", "two bananas"])
    empty, _ = encode(conditioner, [""])
    weights = np.asarray(list(inputs.weights.values())[-1])[..., None]
    assert set(np.unique(weights)) == {1.0, 1.5}
    expected = plain.tokens + (weights - 1) * (plain.tokens - empty.tokens)
    np.testing.assert_allclose(found.tokens, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.tokens[1], plain.tokens[1], atol=1e-6)
    np.testing.assert_allclose(found.pooled, plain.pooled, atol=1e-6)


def test_weights_of_one_are_plain_inputs():
    conditioner = CONDITIONERS["XL"]
    segments = [[("a small red pea", 1.0)], None]
    inputs = conditioner.tokenize_weighted(tokenizers(conditioner), segments)
    plain = conditioner.tokenize(tokenizers(conditioner), ["a small red pea", None])
    assert inputs.weights is inputs.empty is None
    jax.tree.map(np.testing.assert_array_equal, inputs, plain)


def test_tokens_of_xl_are_those_of_both_encoders_and_its_pooled_vector_of_the_second():
    conditioner = CONDITIONERS["XL"]
    cond, inputs = encode(conditioner, ["a small red pea"])
    params, ids = params_of(conditioner), inputs.ids
    first = jax.jit(lambda ids: TEXT.encode(params, "text", ids))(ids["text"])
    second = jax.jit(lambda ids: TEXT_2.encode(params, "text_2", ids))(ids["text_2"])
    tokens = np.concatenate([first.tokens, second.tokens], axis=-1)
    np.testing.assert_allclose(cond.tokens, tokens, atol=1e-6)
    np.testing.assert_allclose(cond.pooled, second.pooled, atol=1e-6)


def test_the_tokens_are_those_of_the_hidden_layer_that_the_encoder_names():
    """At layer 0 a token depends on what it is and where, not on the tokens before it."""
    last, first = CONDITIONERS["masked"], CONDITIONERS["embeddings"]
    params = params_of(last)
    ids = last.tokenize(tokenizers(last), ["a small red pea"])
    other = ids._replace(ids={"text": ids.ids["text"] + np.eye(LENGTH, dtype=np.int32)[1]})
    (a, b), (c, d) = (
        [encoder_of(one)(params, inputs) for inputs in (ids, other)] for one in (last, first)
    )
    np.testing.assert_array_equal(a.pooled, c.pooled)
    np.testing.assert_array_equal(c.tokens[:, 2:], d.tokens[:, 2:])
    assert not np.allclose(a.tokens[:, 2:], b.tokens[:, 2:])


def test_added_tokens_extend_the_embedding_table():
    conditioner = CONDITIONERS["SD 1"]
    longer = tokenizer().with_word("<pea>", 2)
    inputs = conditioner.tokenize({"text": longer}, ["a <pea>"])
    table = params_of(conditioner)["text_encoders"]["text"]["token_embedding"]
    known = conditioner.tokenize({"text": tokenizer()}, ["a red pea"]).ids["text"][0, 2:4]
    added = params_of(conditioner) | {"added_tokens": {"text": table[known]}}
    found = encoder_of(conditioner)(added, inputs)
    assert np.isfinite(found.tokens).all()
    zero = params_of(conditioner) | {"added_tokens": {"text": 0 * table[known]}}
    assert not np.allclose(encoder_of(conditioner)(zero, inputs).tokens, found.tokens)
    # Without them the ids are beyond the vocabulary.
    assert np.isnan(encoder_of(conditioner)(params_of(conditioner), inputs).tokens).any()


def test_tokenizers_that_do_not_fit_are_refused(conditioner):
    conditioner.check_tokenizers(tokenizers(conditioner))
    longer = Tokenizer.train(["a pea"], vocab_size=530, length=LENGTH + 1)
    with pytest.raises(UserError, match=r"gives 9 tokens .* takes \d+ .* set tokenizer\.length"):
        conditioner.check_tokenizers(dict.fromkeys(conditioner.encoders, longer))


def test_the_fingerprint_depends_on_settings_and_tokenizers():
    prints = {c.fingerprint(tokenizers(c)) for c in CONDITIONERS.values()}
    assert len(prints) == len(CONDITIONERS)
    conditioner = CONDITIONERS["XL"]
    other = Tokenizer.train(["a large pear"], vocab_size=530, length=LENGTH)
    changed = conditioner.fingerprint({**tokenizers(conditioner), "text_2": other})
    assert changed not in prints
    assert conditioner.fingerprint(tokenizers(conditioner)) in prints


def test_a_conditioner_survives_json(conditioner):
    assert from_json(AnyConditioner, to_json(conditioner)) == conditioner


def test_flops_are_the_encoders_sum():
    total = TEXT.flops() + TEXT_2.flops()
    assert CONDITIONERS["XL"].flops() == pytest.approx(total)


@pytest.mark.parametrize("name", ["FLUX.2", "Z-Image"])
def test_weights_of_words_are_refused_where_the_encoder_is_a_language_model(name):
    conditioner = CONDITIONERS[name]
    segments = [[("a ", 1.0), ("red", 1.5)], None]
    with pytest.raises(UserError, match=r"'a red' weights words, which Qwen3"):
        conditioner.tokenize_weighted(tokenizers(conditioner), segments)
    inputs = conditioner.tokenize_weighted(tokenizers(conditioner), [[("a red pea", 1.0)], None])
    plain = conditioner.tokenize(tokenizers(conditioner), ["a red pea", None])
    jax.tree.map(np.testing.assert_array_equal, inputs, plain)


def test_tokens_of_z_image_come_first_whatever_the_side_of_padding():
    conditioner = CONDITIONERS["Z-Image"]
    prompts = ["a small pea", ""]
    right = conditioner.tokenize(tokenizers(conditioner), prompts)
    left = conditioner.tokenize({"text": replace(tokenizer(), pad_left=True)}, prompts)
    assert not left.masks["text"][:, 0].any()
    a, b = (encoder_of(conditioner)(params_of(conditioner), inputs) for inputs in (right, left))
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_allclose(a.tokens, b.tokens, atol=1e-4)
    assert not a.tokens[~a.mask].any()


@pytest.mark.parametrize("name", ["FLUX.1", "FLUX.2"])
def test_tokenizers_trained_on_captions_fit_and_load_again(name, tmp_path):
    conditioner = CONDITIONERS[name]
    trained = conditioner.train_tokenizers(["a pea"], vocab_size=530, length=LENGTH)
    conditioner.check_tokenizers(trained)
    for encoder, one in trained.items():
        one.save(str(tmp_path / encoder))
    loaded = conditioner.load_tokenizers(str(tmp_path))
    assert conditioner.fingerprint(loaded) == conditioner.fingerprint(trained)


def test_full_size_crop_is_that_of_an_uncropped_image():
    np.testing.assert_array_equal(full_size_crop(32, 48, 2), [[32, 48, 0, 0, 32, 48]] * 2)
