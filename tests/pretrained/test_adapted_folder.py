"""A model as the adapters of another one, in a folder without that one's weights."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained import load
from jaxdiff.pretrained.adapted_folder import base_of
from jaxdiff.pretrained.bundle import BASE, MODEL, Bundle, abstract_of, write_bundle
from jaxdiff.pretrained.load import load_bundle, read_spec, read_tokenizers
from jaxdiff.sampling.sampler import Sampler

TEXT = ClipTextConfig(vocab_size=540, length=16, width=16, depth=1, heads=2)
SPEC = TextToImage(
    name="teacher",
    denoiser=DiTConfig(width=16, depth=2, heads=2, text_width=16, pooled_width=16),
    conditioner=ClipConditioner(text=ClipTextEncoder(model=TEXT)),
    prediction="x0",
    schedule=RectifiedFlow(),
    image_size=16,
)
STUDENT = dataclasses.replace(SPEC, name="student", sampler=Sampler(num_steps=4))


def normal(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def adapters(width=16):
    """Adapters of rank 3 of the denoiser's queries."""
    pair = {"down": normal(2, width, 3), "up": normal(2, 3, 16)}
    return {"adapters": {"denoiser": {"blocks": {"attention": {"q": {"lora": pair}}}}}}


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The folder of shipped models, with a teacher and its student."""
    monkeypatch.setattr(load, "SHIPPED", load.SHIPPED.__class__(tmp_path))
    params = jax.tree.map(lambda x: normal(*x.shape), abstract_of(SPEC))
    tokenizer = Tokenizer.train(["a red pea", "a green banana"] * 9, vocab_size=540, length=16)
    write_bundle(tmp_path / "teacher", Bundle(SPEC, params, {"text": tokenizer}), "float32")
    alone = Bundle(STUDENT, adapters(), {})
    write_bundle(tmp_path / "student", alone, "float32", base="shipped:teacher")
    return tmp_path


def test_reading_merges_the_adapters(shipped):
    teacher, student = (load_bundle(f"shipped:{name}") for name in ("teacher", "student"))
    assert student.spec == read_spec("shipped:student") == STUDENT
    assert jax.tree.structure(student.params) == jax.tree.structure(teacher.params)
    query = teacher.params["denoiser"]["blocks"]["attention"]["q"]
    query["kernel"] = query["kernel"] + np.matmul(normal(2, 16, 3), normal(2, 3, 16))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        student.params,
        teacher.params,
    )
    for tokenizers in (student.tokenizers, read_tokenizers("shipped:student")):
        np.testing.assert_array_equal(
            tokenizers["text"](["a red pea"]), teacher.tokenizers["text"](["a red pea"])
        )
    assert (shipped / "student" / MODEL).stat().st_size < 3000


def test_a_model_with_all_weights_replaces_one_of_adapters(shipped):
    student = load_bundle("shipped:student")
    write_bundle(shipped / "student", student, "float32")
    assert not (shipped / "student" / BASE).exists()
    again = load_bundle("shipped:student")
    jax.tree.map(np.testing.assert_array_equal, again.params, student.params)


@pytest.mark.parametrize("name", ["../teacher", "teacher", "/tmp/teacher", "a/../b", 3, None])
def test_a_base_is_a_name_that_means_the_same_everywhere(shipped, name):
    (shipped / "student" / BASE).write_text(json.dumps({"model": name}))
    with pytest.raises(UserError, match="names no model: expected shipped:NAME or OWNER/NAME"):
        load_bundle("shipped:student")


def test_adapters_that_fit_no_layer_are_refused(shipped):
    wrong = Bundle(STUDENT, adapters(width=8), {})
    write_bundle(shipped / "student", wrong, "float32", base="shipped:teacher")
    with pytest.raises(UserError, match=r"adapters.denoiser.blocks.attention.q fits no layer"):
        load_bundle("shipped:student")
    write_bundle(shipped / "student", wrong, "float32", base="shipped:student")
    for read in (load_bundle, read_tokenizers):
        with pytest.raises(UserError, match="adapts itself"):
            read("shipped:student")


def test_the_base_is_the_one_model_that_the_recipe_starts_from():
    def recipe(**parts):
        return {"task": {"pretrained": {"type": "Pretrained", "autoencoder": None, **parts}}}

    assert base_of(recipe(denoiser="shipped:a", text_encoders="shipped:a"), "x") == "shipped:a"
    assert base_of(recipe(denoiser="who/what-1.5"), "x") == "who/what-1.5"
    unreadable = {"task": "x"}, {"task": {"pretrained": "x"}}
    several = recipe(denoiser="shipped:a", text_encoders="b/c")
    for given in (recipe(), None, several, *unreadable):
        with pytest.raises(UserError, match="expected one that others can name"):
            base_of(given, "x")
    with pytest.raises(UserError, match="x starts from /runs/mine: expected"):
        base_of(recipe(denoiser="/runs/mine"), "x")
