"""The model specification: parts that fit, one tree of parameters, JSON."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.config.serialization import from_json, to_json
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.flux2 import Flux2AutoencoderConfig
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    Conditioning,
    StableDiffusionXLConditioner,
)
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import bind_build, bind_params, init_params
from jaxdiff.models.lora import LoraConfig, init_adapters
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage, from_uint8, merge_params, tree_of
from jaxdiff.pretrained.bundle import AnySpec
from jaxdiff.pretrained.load import read_spec
from jaxdiff.training.recipe import load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
AUTOENCODER = AutoencoderConfig(
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    latent_channels=6,
    shift_factor=0.1,
    scaling_factor=0.7,
)


@pytest.fixture(scope="module")
def pixels(tiny_recipe) -> TextToImage:
    return tiny_recipe().task.model


@pytest.fixture(scope="module")
def latents(pixels) -> TextToImage:
    denoiser = dataclasses.replace(pixels.denoiser, channels=6, patch_size=2)
    return dataclasses.replace(pixels, denoiser=denoiser, autoencoder=AUTOENCODER)


@pytest.fixture(scope="module")
def xl() -> TextToImage:
    text = ClipTextConfig(vocab_size=530, length=8, width=8, depth=2, heads=2)
    text_2 = dataclasses.replace(text, projection_dim=6)
    return TextToImage(
        name="xl",
        denoiser=UNet2DConditionConfig(
            in_channels=6,
            out_channels=6,
            block_out_channels=(8,),
            layers_per_block=1,
            transformer_layers=(1,),
            heads=(2,),
            cross_attention_dim=16,
            norm_num_groups=4,
            added_width=6 + 6 * 4,
            time_id_width=4,
        ),
        conditioner=StableDiffusionXLConditioner(
            text=ClipTextEncoder(model=text), text_2=ClipTextEncoder(model=text_2)
        ),
        autoencoder=AUTOENCODER,
        prediction="eps",
        schedule=RectifiedFlow(),
        image_size=32,
    )


@pytest.fixture(params=["pixels", "latents", "xl"])
def spec(request) -> TextToImage:
    return request.getfixturevalue(request.param)


def random_like(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), tree)


def test_abstract_params_are_those_that_initialisation_returns(spec):
    def init():
        params = {
            "denoiser": spec.init_denoiser(nnx.Rngs(0)),
            "text_encoders": spec.init_text_encoders(nnx.Rngs(1)),
        }
        if spec.autoencoder is not None:
            autoencoder = spec.autoencoder
            build = lambda rngs: autoencoder.build(rngs=rngs)  # noqa: E731
            params["autoencoder"] = init_params(build, nnx.Rngs(2))
        return params

    found, abstract = jax.eval_shape(init), spec.abstract_params()
    assert jax.tree.structure(found) == jax.tree.structure(abstract)
    described = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (found, abstract)]
    assert described[0] == described[1]
    assert spec.parts[0].path == ("denoiser",)


def test_the_tree_of_parameters_has_the_documented_keys(pixels, xl):
    assert set(pixels.abstract_params()) == {"denoiser", "text_encoders"}
    assert set(pixels.abstract_params()["text_encoders"]) == {"text"}
    assert set(xl.abstract_params()) == {"denoiser", "text_encoders", "autoencoder"}
    assert set(xl.abstract_params()["text_encoders"]) == {"text", "text_2"}


def test_a_specification_survives_json(spec):
    again = from_json(TextToImage, json.loads(json.dumps(to_json(spec))))
    assert again == spec
    assert hash(again) == hash(spec)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_model_of_every_recipe_survives_json(path):
    task = load_recipe(path).task
    if not isinstance(task, DiffusionTask):
        pytest.skip("trains no text-to-image model")
    assert from_json(TextToImage, json.loads(json.dumps(to_json(task.model)))) == task.model


@pytest.mark.parametrize("name", ["produce", "produce_clip"])
def test_a_shipped_model_survives_json_and_is_that_of_its_recipe(name):
    found = read_spec(f"shipped:{name}")
    assert from_json(AnySpec, json.loads(json.dumps(to_json(found)))) == found
    task = load_recipe(Path(__file__).parents[2] / "configs" / f"{name}.py").task
    assert type(found) is type(task.model)


def test_widths_that_do_not_fit_are_refused(pixels):
    text = pixels.conditioner.text
    wider = dataclasses.replace(text.model, projection_dim=24)
    with pytest.raises(UserError, match=r"widths 16 and 16 .* 16 and 24: set denoiser\.text_width"):
        dataclasses.replace(pixels, conditioner=ClipConditioner(text=ClipTextEncoder(model=wider)))
    wide = dataclasses.replace(text.model, width=32, projection_dim=16)
    with pytest.raises(UserError, match=r"widths 16 and 16 .* 32 and 16: set"):
        dataclasses.replace(pixels, conditioner=ClipConditioner(text=ClipTextEncoder(model=wide)))


def test_a_unet_that_reads_no_pooled_text_takes_any(xl):
    wider = dataclasses.replace(xl.conditioner.text_2.model, projection_dim=24)
    conditioner = dataclasses.replace(xl.conditioner, text_2=ClipTextEncoder(model=wider))
    dataclasses.replace(xl, conditioner=conditioner)
    wide = dataclasses.replace(xl.conditioner.text_2.model, width=12)
    conditioner = dataclasses.replace(xl.conditioner, text_2=ClipTextEncoder(model=wide))
    with pytest.raises(UserError, match="widths 16 but the text encoder gives 20"):
        dataclasses.replace(xl, conditioner=conditioner)


def test_channels_that_do_not_fit_are_refused(pixels, latents):
    with pytest.raises(UserError, match=r"has 4 channels .* set denoiser\.channels to 3"):
        dataclasses.replace(pixels, denoiser=dataclasses.replace(pixels.denoiser, channels=4))
    with pytest.raises(UserError, match=r"has 6 channels .* set denoiser\.channels to 3"):
        dataclasses.replace(latents, autoencoder=None)


def test_sizes_follow_from_the_parts(pixels, latents):
    assert (pixels.downsampling, pixels.size_multiple) == (1, 8)
    assert (latents.downsampling, latents.size_multiple) == (2, 4)
    assert pixels.latent_shape(32, 16) == (32, 16, 3)
    assert latents.latent_shape(32, 16) == (16, 8, 6)
    assert not pixels.is_inpainting


def test_images_are_encoded_to_latents_and_decoded(latents, pixels):
    params = random_like({"autoencoder": latents.abstract_params()["autoencoder"]})
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 32, 16, 3)), jnp.float32)
    x = jax.jit(latents.encode)(params, images)
    assert x.shape == (2, *latents.latent_shape(32, 16))
    assert jax.eval_shape(latents.decode, params, x).shape == images.shape
    keyed = jax.jit(latents.encode)(params, images, RowKeys.whole(jax.random.key(0), 2))
    assert not np.allclose(keyed, x)
    np.testing.assert_array_equal(pixels.encode({}, images), images)
    np.testing.assert_array_equal(pixels.decode({}, images), images)


def test_latents_of_cached_moments_are_those_of_the_image(latents):
    """Given the same keys."""
    params = random_like({"autoencoder": latents.abstract_params()["autoencoder"]})
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)

    @jax.jit
    def both(keys):
        autoencoder = nnx.merge(
            nnx.graphdef(nnx.eval_shape(lambda: AUTOENCODER.build(rngs=nnx.Rngs(0)))),
            params["autoencoder"],
        )
        z = autoencoder.encode(images)
        moments = jnp.concatenate([z.mean, z.logvar], axis=-1)
        online = latents.encode(params, images, keys)
        return online, latents.latents_from_moments(params, moments, keys)

    np.testing.assert_allclose(*both(RowKeys.whole(jax.random.key(3), 2)), rtol=1e-5, atol=1e-5)


def test_latents_without_a_variance_are_those_of_cached_means(latents):
    autoencoder = Flux2AutoencoderConfig(
        z_channels=2, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2
    )
    denoiser = dataclasses.replace(latents.denoiser, channels=8)
    spec = dataclasses.replace(latents, autoencoder=autoencoder, denoiser=denoiser)
    assert autoencoder.moment_channels == 8
    params = {"autoencoder": init_params(lambda rngs: autoencoder.build(rngs=rngs), nnx.Rngs(0))}
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)

    @jax.jit
    def both(keys):
        means = bind_params(bind_build(autoencoder), params["autoencoder"]).encode(images).mean
        return spec.encode(params, images, keys), spec.latents_from_moments(params, means, keys)

    online, cached = both(RowKeys.whole(jax.random.key(3), 2))
    assert online.shape == (2, *spec.latent_shape(8, 8))
    np.testing.assert_allclose(online, cached, rtol=1e-5, atol=1e-5)


def test_adapters_in_the_tree_change_the_prediction(pixels):
    params = random_like({"denoiser": pixels.abstract_params()["denoiser"]})
    config = LoraConfig(rank=2)
    build = lambda: pixels.denoiser.build(rngs=nnx.Rngs(0))  # noqa: E731
    adapters = jax.eval_shape(lambda: init_adapters(build(), config, nnx.Rngs(0)))
    adapted = merge_params(params, {"adapters": {"denoiser": random_like(adapters)}})
    nothing = jax.tree.map(jnp.zeros_like, adapted["adapters"])
    rng = np.random.default_rng(1)
    x, tokens, pooled = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 16, 16, 3), (1, 4, 16), (1, 16))
    )
    cond = Conditioning(tokens, jnp.ones((1, 4), bool), pooled)
    predict = jax.jit(pixels.predict)
    plain = predict(params, x, jnp.array([0.5]), cond)
    assert plain.shape == x.shape
    np.testing.assert_array_equal(
        predict(merge_params(params, {"adapters": nothing}), x, jnp.array([0.5]), cond), plain
    )
    assert not np.allclose(predict(adapted, x, jnp.array([0.5]), cond), plain)


def test_partial_trees_are_merged_part_by_part():
    a = tree_of({("text_encoders", "text"): 1, ("denoiser",): 2})
    b = tree_of({("text_encoders", "text_2"): 3, ("adapters", "denoiser"): 4})
    merged = merge_params(a, b)
    assert merged == {
        "text_encoders": {"text": 1, "text_2": 3},
        "denoiser": 2,
        "adapters": {"denoiser": 4},
    }
    assert a["text_encoders"] == {"text": 1}


def test_pixels_are_in_minus_1_to_1():
    images = jnp.array([0, 255], jnp.uint8).reshape(2, 1, 1, 1).repeat(3, -1)
    np.testing.assert_allclose(from_uint8(images)[:, 0, 0], [[-1] * 3, [1] * 3])
