"""Images as vectors: in CLIP's joint space, and in an autoencoder's latents."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.cached_latents import CachedLatents
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError
from jaxdiff.explore.spaces import (
    has_autoencoder,
    is_clip,
    read_autoencoder,
    read_clip,
    read_records,
)
from jaxdiff.training.recipe import load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def recipes():
    names = ("produce", "produce_clip", "produce_autoencoder", "jit_pixel_256")
    return {name: load_recipe(CONFIGS / f"{name}.py") for name in names}


@pytest.fixture(scope="module")
def config(tiny_recipe):
    data = DataConfig(source=Produce(size=64, length=20), transforms=Transforms(size=64))
    return dataclasses.replace(tiny_recipe(), data=data)


@pytest.fixture(scope="module")
def images(config):
    return read_records(config, 12, seed=0).images


def test_recipes_say_which_model_they_train(recipes):
    assert [is_clip(recipe) for recipe in recipes.values()] == [False, True, False, False]
    assert [has_autoencoder(recipe) for recipe in recipes.values()] == [True, False, True, False]


def test_records_are_chosen_by_the_seed(config, images):
    again = read_records(config, 12, seed=0)
    np.testing.assert_array_equal(again.images, images)
    assert images.shape == (12, 64, 64, 3)
    assert len(again.captions) == len(again.names) == 12
    assert all(len(values) == 12 for values in again.truths.values())
    assert read_records(config, 12, seed=1).names != again.names


def test_cached_latents_have_no_images(config):
    source = CachedLatents(path="latents")
    data = dataclasses.replace(config.data, source=source)
    with pytest.raises(UserError, match="latents holds latents: expected images"):
        read_records(dataclasses.replace(config, data=data), 12, seed=0)


def test_images_and_texts_are_unit_vectors_of_one_space(images):
    clip = read_clip("shipped:produce_clip")
    vectors, words = clip.images(images), clip.texts(["a small red pea", "a banana"])
    assert vectors.shape[1] == words.shape[1]
    for x in (vectors, words):
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-4)


@pytest.mark.parametrize("model", [None, "shipped:produce"])
def test_latents_are_those_of_the_autoencoder(config, recipes, images, model):
    recipe = recipes["produce"] if model is None else config
    encode = read_autoencoder(dataclasses.replace(recipe, data=config.data), model)
    assert encode(images[:4]).shape == (4, 8 * 8 * 8)


def test_a_model_without_an_autoencoder_is_refused(config):
    with pytest.raises(UserError, match="shipped:produce_clip is a ClipConfig without autoencoder"):
        read_autoencoder(config, "shipped:produce_clip")
