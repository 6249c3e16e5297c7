"""Weights in prompts: what is syntax, what is text, and what the compiled loop is told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdiff.models.components import Latents, TextTower

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.losses import Objective
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import abstract_params, merge
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.pipelines import program as drawing
from jaxdiff.pipelines.prompt_weights import Part, Words, parse, plain, rows_of
from jaxdiff.training.tasks.diffusion import DiffusionTask, TextToImage


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
    assert [tokenizer.backend.id_to_token(i) for i in rows["p_ids"][heavy]] == ["red</w>"]
    np.testing.assert_array_equal(rows["p_more_weights"][1, 0].max(), 3)
    np.testing.assert_array_equal(rows["p_empty"], tokenizer([""] * n))
    with pytest.raises(UserError, match="for the prompt itself"):
        rows_of(tokenizer, prompts)


def towers(name):
    """A task that is told of prompts as Stable Diffusion is, 1 or XL, its towers tiny."""
    text = ClipTextConfig(vocab_size=600, length=16, width=8, depth=2, heads=2)
    unet = UNet2DConditionConfig(
        block_out_channels=(8,),
        layers_per_block=1,
        transformer_layers=(1,),
        heads=(2,),
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    latents = Latents(model=AutoencoderConfig(), pretrained="unused")
    objective = Objective(prediction="eps")
    first = TextTower(model=text, trained=False)
    if name == "CLIP-L":
        return DiffusionTask(denoiser=unet, text=first, latents=latents, objective=objective)
    wide = dataclasses.replace(text, width=12, heads=3, activation="gelu", projection_dim=6)
    return DiffusionTask(
        denoiser=dataclasses.replace(
            unet, cross_attention_dim=20, added_width=6 + 6 * 4, time_id_width=4
        ),
        text=dataclasses.replace(first, layer=1, final_norm=False),
        text_2=TextTower(model=wide, trained=False, layer=1, final_norm=False, pad_id=0),
        zero_empty_prompt=True,
        latents=latents,
        objective=objective,
    )


@pytest.mark.parametrize(("name", "width"), [("CLIP-L", 8), ("XL", 20)])
def test_a_weight_moves_its_words_alone_in_all_towers_together(tokenizer, name, width):
    task, rng = towers(name), np.random.default_rng(0)
    frozen = {
        part: jax.tree.map(
            lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
            abstract_params(tower.build),
        )
        for part, tower in task.frozen().items()
        if part != "autoencoder"
    }

    denoiser = object.__new__(TextToImage)  # which no text goes through

    @jax.jit
    def read(rows):
        return drawing._features(task, denoiser, frozen, rows, "", (64, 64), 6.0)

    told = read(rows_of(tokenizer, ["a red pea", "a (red:1.3) pea"]))
    light, heavy = np.asarray(told.tokens)
    assert heavy.shape == (16, width)
    # The denoiser of XL is told zeros of an empty prompt; words are weighted against its encoding.
    read_empty = [
        tower.read(
            merge(task.frozen()[part].build, frozen[part]), jnp.asarray(tokenizer([""]))
        ).tokens[0]
        for part, tower in task.towers.items()
    ]
    empty = np.concatenate(read_empty, axis=-1)
    expected = light.copy()
    expected[2] += 0.3 * (light - empty)[2]  # after the start and "a"
    np.testing.assert_allclose(heavy, expected, atol=1e-5)
    alone = read(rows_of(tokenizer, ["a red pea"] * 2)).tokens[0]  # by a program of its own
    np.testing.assert_allclose(light, alone, atol=1e-6)
    for tower in (slice(0, 8), slice(-8, None)):
        assert np.abs(heavy - light)[2, tower].max() > 0.01
    if name == "XL":
        np.testing.assert_array_equal(*told.pooled)
