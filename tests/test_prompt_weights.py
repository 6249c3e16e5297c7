"""Weights in prompts: what is syntax, what is text, and what the compiled loop is told."""

import numpy as np
import pytest

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.prompt_weights import Part, Words, parse, plain, rows_of


@pytest.fixture(scope="module")
def tokenizer():
    captions = ["a small red pea", "a green tomato with a stem"]
    return Tokenizer.train(captions, vocab_size=600, length=16)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a (red:1.3) pea", [("a ", 1), ("red", 1.3), (" pea", 1)]),
        ("(red:.5)(pea:2)", [("red", 0.5), ("pea", 2)]),
        ("(a (red:1.5) pea:2)", [("a ", 2), ("red", 3), (" pea", 2)]),
        ("((red:1.5):2) pea", [("red", 3), (" pea", 1)]),
        ("(a (small) pea : -0.5 )", [("a (small) pea ", -0.5)]),
    ],
)
def test_groups_with_a_number_have_weights_which_multiply(prompt, words):
    assert parse(prompt) == (Part(tuple(Words(*each) for each in words)),)


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
    ],
)
def test_everything_else_is_text(prompt, text):
    assert parse(prompt) == (Part((Words(text),)),)
    assert plain(prompt) == text


def test_prompts_are_composed_with_weights_and_words_within_them_have_theirs():
    parts = parse('"a pea":1  "a (red:2) pot": -0.5')
    red = (Words("a "), Words("red", 2.0), Words(" pot"))
    assert parts == (Part((Words("a pea"),), 1.0), Part(red, -0.5))
    assert plain('"a pea":1 "red":-0.5 "a \\"pot\\"":2') == 'a pea, a "pot"'


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (red:1,3) pea", "1,3 in the prompt"),
        ("a (red:13) pea", "expected a number from -10 to 10"),
        ("a (:1.3) pea", "about no words"),
        ("a (red:1.3 pea (red:1.3", "not closed"),
        ('"a pea":1 red', "'red' in the prompt"),
        ('"a pea":1 "red"', "is no weighted prompt"),
        ('"a pea":1.2.3', "is no weighted prompt"),
        ('"a pea":99', "99 in the prompt"),
    ],
)
def test_malformed_weights_are_refused(prompt, message):
    with pytest.raises(UserError, match=message):
        parse(prompt)


def test_words_without_weights_are_told_as_ever(tokenizer):
    prompts = ["a (red:1) pea", "a (green) tomato"]
    rows = rows_of(tokenizer, prompts)
    assert rows.keys() == {"ids"}
    np.testing.assert_array_equal(rows["ids"], tokenizer(["a red pea", prompts[1]]))


def test_weights_go_by_token_and_parts_are_filled_up(tokenizer):
    prompts = ["a (red:2) pea", '"a pea":1 "a (red:3) pea":-0.5 "red":2', "a pea"]
    rows = rows_of(tokenizer, prompts, "p_", composed=True)
    n, length = 3, tokenizer.length
    shapes = {"ids": (n, length), "more_ids": (n, 3, length), "parts": (n, 4)}
    assert {name: rows[f"p_{name}"].shape for name in shapes} == shapes
    np.testing.assert_array_equal(rows["p_parts"], [[1, 0, 0, 0], [1, -0.5, 2, 0], [1, 0, 0, 0]])
    heavy = rows["p_weights"] != 1
    assert [tokenizer.bpe.id_to_token(i) for i in rows["p_ids"][heavy]] == ["red</w>"]
    np.testing.assert_array_equal(rows["p_more_weights"][1, 0].max(), 3)
    np.testing.assert_array_equal(rows["p_empty"], tokenizer([""] * n))
    with pytest.raises(UserError, match="for the prompt itself"):
        rows_of(tokenizer, prompts)
