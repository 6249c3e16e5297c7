"""Small models."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.schedules import RectifiedFlow, ScaledLinear
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    StableDiffusionXLConditioner,
)
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.bundle import Bundle, abstract_of


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """`random_params(spec)` initialises every parameter with normal noise, also of one network."""

    def init(spec, dtype=np.float32, scale=0.3):
        rng = np.random.default_rng(0)
        is_network = hasattr(spec, "build")
        abstract = abstract_params(bind_build(spec)) if is_network else abstract_of(spec)
        return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(dtype), abstract)

    return init


@pytest.fixture(scope="session")
def small_bundle(random_params) -> Bundle:
    """A DiT on pixels with one text encoder."""
    tokenizer = Tokenizer.train(
        ["a small red pea", "a green tomato with a stem"], vocab_size=600, length=16
    )
    text = ClipTextConfig(vocab_size=tokenizer.vocab_size, length=16, width=32, depth=2, heads=2)
    spec = TextToImage(
        name="small",
        denoiser=DiTConfig(
            patch_size=8, width=32, depth=2, heads=2, text_width=32, pooled_width=32
        ),
        conditioner=ClipConditioner(text=ClipTextEncoder(model=text)),
        prediction="x0",
        schedule=RectifiedFlow(),
        image_size=16,
    )
    return Bundle(spec, random_params(spec), {"text": tokenizer})


@pytest.fixture(scope="session")
def stable_diffusions() -> dict[str, TextToImage]:
    """Small models of Stable Diffusion's kinds: SD, XL and its refiner."""
    width = 8
    text = ClipTextEncoder(
        model=ClipTextConfig(vocab_size=600, length=16, width=width, depth=2, heads=2)
    )
    sd = TextToImage(
        denoiser=UNet2DConditionConfig(
            block_out_channels=(width, width),
            layers_per_block=1,
            transformer_layers=(0, 2),
            middle_transformer_layers=1,
            heads=(2, 2),
            cross_attention_dim=width,
            norm_num_groups=4,
        ),
        conditioner=ClipConditioner(text=text, masked=False),
        autoencoder=AutoencoderConfig(),
        prediction="eps",
        schedule=ScaledLinear(),
        image_size=64,
    )
    projected = dataclasses.replace(
        text, model=dataclasses.replace(text.model, projection_dim=width)
    )
    added = {"added_width": width + 24, "time_id_width": 4}
    xl = dataclasses.replace(
        sd,
        denoiser=dataclasses.replace(sd.denoiser, cross_attention_dim=2 * width, **added),
        conditioner=StableDiffusionXLConditioner(text=text, text_2=projected),
    )
    refiner = dataclasses.replace(
        sd,
        denoiser=dataclasses.replace(sd.denoiser, **added),
        conditioner=StableDiffusionXLConditioner(text_2=projected),
    )
    return {"SD": sd, "XL": xl, "refiner": refiner}
