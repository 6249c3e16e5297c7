"""Pipelines of networks like Stable Diffusion's: inpainting, tiles, and absent prompts of XL."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    StableDiffusionXLConditioner,
)
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.input_images import InitImage
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import DDIM

PEA, TOMATO = "a small red pea", "a green tomato with a stem"
TEXT = ClipTextConfig(vocab_size=600, length=16, width=8, depth=2, heads=2)
UNET = UNet2DConditionConfig(
    block_out_channels=(8,),
    layers_per_block=1,
    transformer_layers=(1,),
    heads=(2,),
    cross_attention_dim=8,
    norm_num_groups=4,
)
SPEC = TextToImage(
    name="small",
    denoiser=UNET,
    conditioner=ClipConditioner(text=ClipTextEncoder(model=TEXT), masked=False),
    autoencoder=AutoencoderConfig(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
    ),
    prediction="eps",
    schedule=ScaledLinear(),
    image_size=16,
    sampler=Sampler(solver=DDIM(), num_steps=2, init_noise="unit"),
)


@pytest.fixture(scope="module")
def make(tiny_bundle):
    """`make(spec)`: its pipeline, with random weights, on one device."""
    tokenizer = tiny_bundle.tokenizers["text"]

    def make(spec):
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), spec.abstract_params()
        )
        tokenizers = dict.fromkeys(spec.conditioner.encoders, tokenizer)
        return Pipeline(Bundle(spec, params, tokenizers), devices=jax.devices()[:1])

    return make


@pytest.mark.slow
def test_an_inpainting_network_reads_mask_and_image_and_keeps_pixels(make, vae_modes):
    inpainting = dataclasses.replace(SPEC, denoiser=dataclasses.replace(UNET, in_channels=9))
    pipe = make(inpainting)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.float32)
    mask[:, 8:] = 1
    (one,) = pipe(PEA, init=InitImage(image=image, mask=mask))
    np.testing.assert_array_equal(one[:, :8], image[:, :8])
    other = image.copy()
    other[:, :8] = 255 - other[:, :8]
    (two,) = pipe(PEA, init=InitImage(image=other, mask=mask))
    assert (one[:, 8:] != two[:, 8:]).any()  # what is kept shapes what is new
    pipe(PEA, init=InitImage(image=image, mask=mask), sampler=Sampler(vae_mode="slicing"))
    assert vae_modes["encode"] == {"full", "slicing"}
    composed = pipe('"a pea":1 "red":-0.5', init=InitImage(image=image, mask=mask))
    assert composed.shape == (1, 16, 16, 3)
    for init in (None, InitImage(image=image)):
        with pytest.raises(
            UserError, match="small is for inpainting: expected init with an image and"
        ):
            pipe(PEA, init=init)
    with pytest.raises(UserError, match="omit overlap"):
        pipe(PEA, init=InitImage(image=image, mask=mask), sampler=Sampler(overlap=0.5))


def test_a_network_of_convolutions_wraps_as_a_whole(make):
    """Noise that is rolled around gives the image rolled around."""
    pipe = make(SPEC)
    noise = pipe.noise([3])
    arguments = {"sampler": Sampler(wrap=(True, True)), "output": "latents"}
    latents = pipe(PEA, latents=noise, **arguments)
    rolled = pipe(PEA, latents=np.roll(noise, (3, 2), (1, 2)), **arguments)
    np.testing.assert_allclose(rolled, np.roll(latents, (3, 2), (1, 2)), atol=1e-4)
    plain = pipe(PEA, latents=noise, output="latents")
    assert np.abs(plain - latents).max() > 1e-3


def test_an_absent_negative_prompt_of_xl_is_zeros_and_the_empty_one_is_not(make):
    wide = dataclasses.replace(TEXT, width=12, heads=3, activation="gelu", projection_dim=6)
    xl = dataclasses.replace(
        SPEC,
        denoiser=dataclasses.replace(
            UNET, cross_attention_dim=20, added_width=6 + 6 * 4, time_id_width=4
        ),
        conditioner=StableDiffusionXLConditioner(
            text=ClipTextEncoder(model=TEXT, hidden_layer=1, final_norm=False),
            text_2=ClipTextEncoder(model=wide, hidden_layer=1, final_norm=False),
        ),
    )
    pipe = make(xl)
    absent, empty, other = (
        pipe(PEA, negative_prompt=negative, output="float") for negative in (None, "", TOMATO)
    )
    assert np.abs(absent - empty).max() > 1e-3
    assert np.abs(empty - other).max() > 1e-3
    same = dataclasses.replace(
        xl, conditioner=dataclasses.replace(xl.conditioner, zero_absent=False)
    )
    pipe = make(same)
    np.testing.assert_array_equal(pipe(PEA, negative_prompt=None), pipe(PEA, negative_prompt=""))


def test_stable_diffusion_is_unguided_at_1_and_below(make, recwarn):
    """As in diffusers, whose pipelines guide where the scale exceeds 1."""
    pipe = make(SPEC)
    arguments = {"seeds": 3, "negative_prompt": TOMATO, "output": "float"}
    unguided = pipe(PEA, guidance_scale=1, **arguments)
    for scale in (0, 0.5, -1, 0.999):
        np.testing.assert_array_equal(pipe(PEA, guidance_scale=scale, **arguments), unguided)
    (mixed,) = pipe([PEA, PEA], guidance_scale=[0, 3], **arguments)[:1]
    np.testing.assert_allclose(mixed, unguided[0], atol=1e-5)  # of another program
    assert (pipe(PEA, guidance_scale=1.5, **arguments) != unguided).any()
    assert (pipe(TOMATO, guidance_scale=0, **arguments) != unguided).any()
    assert not recwarn.list
