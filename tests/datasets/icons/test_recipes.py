"""The recipes of icons, made tiny, train a few steps on tiny icon sets, each on the last ones."""

import dataclasses
import json

import numpy as np
import pytest

from jaxdiff.data.sources.cached_latents import LatentOptions
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.training.recipe import load_recipe
from jaxdiff.training.run import run_recipe

SIZE = 32
WIDTHS = {"width": 16, "heads": 2, "projection_dim": 16}


def tiny(name, places):
    """The recipe on images of 32 pixels, for two steps."""
    recipe, replace = load_recipe(name), dataclasses.replace
    return replace(
        recipe,
        data=replace(
            recipe.data,
            source=replace(recipe.data.source, size=SIZE, length=24, **places),
            transforms=replace(recipe.data.transforms, size=SIZE),
        ),
        tokenizer=replace(recipe.tokenizer, vocab_size=600, records=20),
        train=replace(recipe.train, steps=2, batch_size=8, log_every=1, checkpoint_every=2),
        evaluators=(),
    )


def train(config, folder):
    result = run_recipe(config, str(folder), log=lambda _: None)
    assert result.finished
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert losses
    assert np.isfinite(losses).all()
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def autoencoder(places, runs):
    config, replace = tiny("icons_autoencoder", places), dataclasses.replace
    model = replace(config.task.model, block_out_channels=(8, 16))
    task = replace(config.task, model=model, pretrained=None)
    return train(replace(config, task=task), runs / "autoencoder"), model


@pytest.fixture(scope="module")
def clip(places, runs):
    config, replace = tiny("icons_clip", places), dataclasses.replace
    text = replace(config.task.model.text, vocab_size=600, depth=1, **WIDTHS)
    vision = replace(config.task.model.vision, image_size=SIZE, depth=1, **WIDTHS)
    model = replace(config.task.model, text=text, vision=vision)
    return train(replace(config, task=replace(config.task, model=model)), runs / "clip"), text


@pytest.mark.nightly
def test_the_family_trains_in_order(places, runs, autoencoder, clip):
    config, replace = tiny("icons", places), dataclasses.replace
    model = config.task.model
    encoder = replace(model.conditioner.text, model=clip[1])
    model = replace(
        model,
        denoiser=replace(model.denoiser, width=32, depth=1, text_width=16, pooled_width=16),
        conditioner=replace(model.conditioner, text=encoder),
        autoencoder=autoencoder[1],
        image_size=SIZE,
    )
    bases = replace(config.task.pretrained, text_encoders=clip[0], autoencoder=autoencoder[0])
    task = replace(config.task, model=model, pretrained=bases)
    data = replace(config.data, cache=LatentOptions(views=1, text=True))
    out = train(replace(config, task=task, data=data), runs / "icons")
    spec, _, tokenizers = load_bundle(out)
    assert spec == model
    assert len(tokenizers) == 1
