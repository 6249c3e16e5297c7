"""Adapters on a whole model: of the denoiser and of text encoders, trained or frozen."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxdiff.errors import UserError
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.models.lora import Factors
from jaxdiff.pipelines.lora import adapters_of, attach, detach, merge, scaled
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.training.tasks.clip import ClipTask

QUERY = ("blocks", "attention", "q")
WORDS = ("blocks", "mlp_in")


def draw(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module", params=[True, False], ids=["trained text", "frozen text"])
def bundle(request, tiny_recipe) -> Bundle:
    config = tiny_recipe()
    text = dataclasses.replace(config.task.text, trained=request.param)
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, text=text))

    def random(build):
        return jax.tree.map(lambda x: draw(*x.shape), abstract_params(build))

    params = random(bind_init(type(config.task).build, config.task))
    frozen = {name: random(part.build) for name, part in config.task.frozen().items()}
    return Bundle(config, params, frozen, None)


def some(bundle, rank):
    """An adapter of the denoiser's queries and, in the text encoder, of the MLP's first layer."""
    text = {**bundle.frozen, **bundle.params}["text"]
    kernels = {
        ("denoiser", QUERY): bundle.params["denoiser"]["blocks"]["attention"]["q"]["kernel"],
        ("text", WORDS): text["blocks"]["mlp_in"]["kernel"],
    }
    return {
        part: {
            path: Factors(draw(*kernel.shape[:2], rank), draw(len(kernel), rank, kernel.shape[2]))
        }
        for (part, path), kernel in kernels.items()
    }


def assert_same(a, b):
    assert a.config.task == b.config.task
    for ours, theirs in ((a.params, b.params), (a.frozen, b.frozen)):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), ours, theirs
        )


def assert_same_change(a, b):
    assert set(a) == set(b)
    for part in a:
        assert set(a[part]) == set(b[part])
        for path, pair in a[part].items():
            np.testing.assert_allclose(pair.product, b[part][path].product, rtol=1e-4, atol=1e-4)


def test_what_is_put_on_fits_its_recipe_and_comes_off(bundle):
    there = some(bundle, rank=2)
    model = attach(bundle, there)
    task = model.config.task
    for ours, build in (
        (model.params, lambda: task.build(nnx.Rngs(0))),
        *((model.frozen[name], part.build) for name, part in task.frozen().items()),
    ):
        shapes = jax.tree.map(np.shape, ours)
        assert shapes == jax.tree.map(lambda x: x.shape, abstract_params(build))
    assert_same_change(adapters_of(model), there)
    name, text = bundle.config.name, bundle.config.task.text
    text = dataclasses.replace(text, pretrained=name if text.trained else None)
    named = dataclasses.replace(bundle.config.task, pretrained=name, text=text)
    plain = bundle._replace(config=dataclasses.replace(bundle.config, task=named))
    assert_same(detach(model), plain)


def test_several_add_up_in_any_order(bundle):
    one, two = some(bundle, rank=2), scaled(some(bundle, rank=3), 0.5)
    del two["text"]
    both = attach(attach(bundle, one), two)
    other = attach(attach(bundle, two), one)
    assert both.config.task.lora.rank == 5
    assert_same_change(adapters_of(both), adapters_of(other))
    at_once = merge(detach(both), adapters_of(both))
    assert_same(at_once, merge(merge(detach(both), one), two))


def test_one_is_merged_beside_another(bundle):
    one, two = some(bundle, rank=2), some(bundle, rank=1)
    model = merge(attach(bundle, one), two)
    assert_same_change(adapters_of(model), one)
    merged = merge(bundle, two)
    back = detach(model)
    assert_same(back._replace(config=merged.config), merged)


def test_a_model_of_another_kind_is_told(bundle):
    from jaxdiff.training.recipe import load_recipe

    config = load_recipe("configs/produce_clip.py")
    assert isinstance(config.task, ClipTask)
    with pytest.raises(UserError, match="is a ClipTask, which has no adapters"):
        adapters_of(bundle._replace(config=config))
