"""Weights in prompts: what is syntax, what is text, and what the program reads."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    StableDiffusionXLConditioner,
)
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.pipelines.prompt_weights import PromptPart, WeightedText, parse_prompt, plain, tokenize


@pytest.fixture(scope="module")
def tokenizer():
    captions = ["a small red pea", "a green tomato with a stem"]
    return Tokenizer.train(captions, vocab_size=600, length=16)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a (red:1.3) pea", [("a ", 1), ("red", 1.3), (" pea", 1)]),
        ("(red:.5)(pea:2)", [("red", 0.5), (" pea", 2)]),
        ("red(pea:2)", [("red", 1), (" pea", 2)]),
        ("(red:2)pea", [("red", 2), (" pea", 1)]),
        ("(red:2),(pea:.5)", [("red", 2), (",", 1), ("pea", 0.5)]),
        ("(!:2)(?:.5)", [("!", 2), (" ?", 0.5)]),
        ("(a:1.1:2)", [("a:1.1", 2)]),
        ("(a (b:2) c:.5)d", [("a ", 0.5), ("b", 1), (" c", 0.5), (" d", 1)]),
        ("(a (red:1.5) pea:2)", [("a ", 2), ("red", 3), (" pea", 2)]),
        ("((red:1.5):2) pea", [("red", 3), (" pea", 1)]),
        ("(a (small) pea : -0.5 )", [("a (small) pea ", -0.5)]),
    ],
)
def test_groups_with_a_number_have_weights_which_multiply(prompt, words):
    assert parse_prompt(prompt) == (PromptPart(tuple(WeightedText(*each) for each in words)),)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", ""),
        ("a (small) pea) (", "a (small) pea) ("),
        ("(a note: peas) (at 10:30pm)", "(a note: peas) (at 10:30pm)"),
        ('a sign that says "peas": fresh', 'a sign that says "peas": fresh'),
        ('"peas": fresh', '"peas": fresh'),
        (r"\(red:1.3\) (16\:9)", "(red:1.3) (16:9)"),
        (r"a \small \\ \"pea\"", r'a \small \ "pea"'),
        ("a (red:1) pea", "a red pea"),
        ("(red:1)(pea:1)", "redpea"),  # weights that are equal are one run, as in AUTOMATIC1111
        ("(a:nan) (b:inf) (c:1e9)", "(a:nan) (b:inf) (c:1e9)"),
        (r"(a\:1.1) \(b:2", "(a:1.1) (b:2"),
        ("[a] [[b]] [a:b:0.5]", "[a] [[b]] [a:b:0.5]"),
        ("() (:) (()", "() (:) (()"),
    ],
)
def test_everything_else_is_text(prompt, text):
    assert parse_prompt(prompt) == (PromptPart((WeightedText(text),)),)
    assert plain(prompt) == text


def test_prompts_are_composed_with_weights_and_words_within_them_have_theirs():
    parts = parse_prompt('"a pea":1  "a (red:2) pot": -0.5')
    red = (WeightedText("a "), WeightedText("red", 2.0), WeightedText(" pot"))
    assert parts == (PromptPart((WeightedText("a pea"),), 1.0), PromptPart(red, -0.5))
    assert plain('"a pea":1 "red":-0.5 "a \\"pot\\"":2') == 'a pea, a "pot"'


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (red:1,3) pea", "1,3 in the prompt"),
        ("a (red:13) pea", "expected a number from -10 to 10"),
        ("a (:1.3) pea", "has no words"),
        ("a (b) (c ( :1.3):2)", "has no words"),
        ("(a:1.2(b", "not closed"),
        ("((a:5):5)", "multiply to 25"),
        ("((a:-5):5)", "multiply to -25"),
        ("a (red:1.3 pea (red:1.3", "not closed"),
        ('"a pea":1 red', "'red' in the prompt"),
        ('"a pea":1 "red"', "is no weighted prompt"),
        ('"a pea":1.2.3', "is no weighted prompt"),
        ('"a pea":99', "99 in the prompt"),
    ],
)
def test_malformed_weights_are_refused(prompt, message):
    with pytest.raises(UserError, match=message):
        parse_prompt(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "(" * 100_000,
        ")" * 100_000,
        "(" * 50_000 + "a" + ")" * 50_000,
        "(" * 50_000 + "a:1" + "):1" * 49_999 + ")",
        "(a:1.1)" * 15_000,
        "(a:" + "1" * 100_000 + ")",
        '"' + '\\"' * 50_000,
        '"a":1 ' * 20_000,
        '"a":1 ' * 20_000 + "b",
        '"a":' + "1" * 100_000 + "x",
        '"a":1 "b":' + "1" * 100_000 + "x",
        "(a:" + "1" * 100_000 + ",)",
    ],
    ids=lambda prompt: f"{prompt[:9]}",
)
def test_long_prompts_are_parsed_at_once_and_quoted_in_part(prompt):
    start = time.process_time()
    try:
        parse_prompt(prompt)
    except UserError as error:
        assert len(str(error)) < 500  # noqa: PT017
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("prompt", "plainly"),
    [
        ("(red:1.2)(pea:0.8)", "red pea"),
        ("(red:1.2) (pea:0.8)", "red pea"),
        ("(red:1.2),(pea:0.8)", "red,pea"),
        ("red(pea:1.3)", "red pea"),
        ("(small:1.2)(1:0.8)!", "small 1!"),
    ],
)
def test_groups_that_touch_are_words_of_their_own(prompt, plainly, tokenizer):
    (part,) = parse_prompt(prompt)
    np.testing.assert_array_equal(tokenizer.weighted(part.texts)[0], tokenizer([plainly])[0])


def test_words_without_weights_are_plain_ids(tokenizer):
    prompts = ["a (red:1) pea", "a (green) tomato"]
    found = tokenize(sd("CLIP-L"), {"text": tokenizer}, prompts)
    assert found.text.weights is None
    assert found.composed_text is None
    np.testing.assert_array_equal(found.text.ids["text"], tokenizer(["a red pea", prompts[1]]))


def test_weights_go_by_token_and_parts_are_padded(tokenizer):
    prompts = ["a (red:2) pea", '"a pea":1 "a (red:3) pea":-0.5 "red":2', "a pea"]
    conditioner, tokenizers = sd("CLIP-L"), {"text": tokenizer}
    text, further, weights = tokenize(conditioner, tokenizers, prompts, composed=True)
    n, length = 3, tokenizer.length
    assert text.ids["text"].shape == (n, length)
    assert further.ids["text"].shape == (n, 3, length)
    np.testing.assert_array_equal(weights, [[1, 0, 0, 0], [1, -0.5, 2, 0], [1, 0, 0, 0]])
    heavy = text.weights["text"] != 1
    assert [tokenizer.backend.id_to_token(i) for i in text.ids["text"][heavy]] == ["red</w>"]
    np.testing.assert_array_equal(further.weights["text"][1, 0].max(), 3)
    np.testing.assert_array_equal(text.empty["text"], tokenizer([""] * n))
    with pytest.raises(UserError, match="second prompt of a mixture cannot be composed"):
        tokenize(conditioner, tokenizers, prompts)


def sd(name):
    """A model that reads prompts as Stable Diffusion 1 or XL does, its text encoders tiny."""
    text = ClipTextConfig(vocab_size=600, length=16, width=8, depth=2, heads=2)
    if name == "CLIP-L":
        return ClipConditioner(text=ClipTextEncoder(model=text), masked=False)
    wide = dataclasses.replace(text, width=12, heads=3, activation="gelu", projection_dim=6)
    return StableDiffusionXLConditioner(
        text=ClipTextEncoder(model=text, hidden_layer=1, final_norm=False),
        text_2=ClipTextEncoder(model=wide, hidden_layer=1, final_norm=False),
    )


@pytest.mark.parametrize(("name", "width"), [("CLIP-L", 8), ("XL", 20)])
def test_a_weight_moves_its_words_alone_in_all_text_encoders_together(tokenizer, name, width):
    conditioner, rng = sd(name), np.random.default_rng(0)
    encoders = {
        part: jax.tree.map(
            lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
            abstract_params(bind_init(ClipTextEncoder.build, encoder)),
        )
        for part, encoder in conditioner.encoders.items()
    }
    tokenizers = dict.fromkeys(encoders, tokenizer)

    @jax.jit
    def encode(inputs):
        return conditioner.encode({"text_encoders": encoders}, inputs)

    def encoded(prompts):
        return encode(tokenize(conditioner, tokenizers, prompts).text)

    cond = encoded(["a red pea", "a (red:1.3) pea"])
    light, heavy = np.asarray(cond.tokens)
    assert heavy.shape == (16, width)
    (empty,) = np.asarray(encoded([""]).tokens)  # that was given: an absent one is zeros in XL
    expected = light.copy()
    expected[2] += 0.3 * (light - empty)[2]  # after the start and "a"
    np.testing.assert_allclose(heavy, expected, atol=1e-5)
    alone = encoded(["a red pea"] * 2).tokens[0]  # by a program of its own
    np.testing.assert_allclose(light, alone, atol=1e-6)
    for encoder in (slice(0, 8), slice(-8, None)):
        assert np.abs(heavy - light)[2, encoder].max() > 0.01
    if name == "XL":
        np.testing.assert_array_equal(*cond.pooled)


def test_an_absent_prompt_is_zeros_in_xl_and_the_empty_text_is_not(tokenizer):
    absent = tokenize(sd("XL"), {"text": tokenizer, "text_2": tokenizer}, [None, "", "a pea"]).text
    np.testing.assert_array_equal(absent.absent, [True, False, False])
