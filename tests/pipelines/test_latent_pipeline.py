"""A pipeline of latents, and the autoencoder that decodes them."""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.io.images import to_uint8
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.layers import abstract_params, bind_init, bind_params
from jaxdiff.models.text_to_image import from_uint8
from jaxdiff.pipelines.input_images import InitImage
from jaxdiff.pipelines.load import load
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.bundle import Bundle, write_bundle, write_weights
from jaxdiff.sampling.guidance.autoguidance import Autoguidance
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import DDIM

PEA = "a small red pea"
FIELDS = dataclasses.fields(AutoencoderConfig)


@pytest.fixture(scope="module")
def latent_bundle(tiny_bundle):
    small = AutoencoderConfig(
        latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
    )
    spec = dataclasses.replace(
        tiny_bundle.spec,
        denoiser=dataclasses.replace(tiny_bundle.spec.denoiser, channels=4, patch_size=4, depth=1),
        autoencoder=small,
        sampler=Sampler(solver=DDIM(), num_steps=1),
    )
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), spec.abstract_params())
    rng = np.random.default_rng(1)
    params["autoencoder"] = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), params["autoencoder"]
    )
    return Bundle(spec, params, tiny_bundle.tokenizers)


def test_latents_are_decoded(latent_bundle, tmp_path):
    spec, params, _ = latent_bundle
    write_bundle(tmp_path / "model", latent_bundle, dtype="float32")
    assert load(str(tmp_path / "model"))(PEA).shape == (1, 32, 32, 3)
    pipe = Pipeline(latent_bundle)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    back = pipe.autoencode(images)
    with pytest.raises(UserError, match="values from 0 to 255"):
        pipe.autoencode(images.astype(np.float32))

    @jax.jit
    def ping_pong(params, images):
        model = bind_params(bind_init(AutoencoderConfig.build, spec.autoencoder), params)
        return model.decode(model.encode(from_uint8(images)).mode())

    expected = to_uint8(ping_pong(params["autoencoder"], images))
    assert np.abs(back.astype(int) - expected).max() <= 1  # sums of another batch size
    with pytest.raises(UserError, match="multiples of 8"):
        pipe(PEA, size=(20, 32))

    partial = {name: part for name, part in params.items() if name != "autoencoder"}
    write_weights(epath.Path(tmp_path / "model" / "model.safetensors"), partial)
    with pytest.raises(UserError, match=r"autoencoder\."):
        load(str(tmp_path / "model"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnAutoencoder(AutoencoderConfig):
    """Someone else's."""


def test_types_that_a_user_names_are_loaded(latent_bundle, tmp_path):
    fields = {f.name: getattr(latent_bundle.spec.autoencoder, f.name) for f in FIELDS}
    own = OwnAutoencoder(**fields)
    spec = dataclasses.replace(latent_bundle.spec, autoencoder=own)
    write_bundle(tmp_path / "own", latent_bundle._replace(spec=spec), dtype="float32")
    with pytest.raises(UserError, match="name a type of your own"):
        load(tmp_path / "own")
    pipe = load(tmp_path / "own", types=[OwnAutoencoder])
    assert pipe.spec.autoencoder == own
    guide = Guidance(guide=Autoguidance(model=str(tmp_path / "own"), scale=1.0))
    np.testing.assert_allclose(
        pipe(PEA, guidance=guide, output="float"), pipe(PEA, output="float"), atol=1e-5
    )
    assert pipe.with_bundle(pipe.bundle).types == (OwnAutoencoder,)


def test_latents_of_a_call_decode_to_its_images(latent_bundle):
    pipe = Pipeline(latent_bundle)
    latents = pipe(PEA, seeds=3, output="latents")
    assert latents.shape == (1, 16, 16, 4)
    difference = pipe.decode(latents).astype(int) - pipe(PEA, seeds=3)
    assert np.abs(difference).max() <= 1


def test_latents_start_from_images_by_the_mode_of_the_autoencoder(latent_bundle, vae_modes):
    init = InitImage(image=np.zeros((32, 32, 3), np.uint8), strength=0.5)
    slicing = Sampler(vae_mode="slicing")
    Pipeline(latent_bundle)(PEA, init=init, output="latents", sampler=slicing)
    assert vae_modes["encode"] == {"slicing"}


def test_previews_are_decoded_by_the_mode_of_the_autoencoder(latent_bundle, vae_modes):
    pipe, tiling, seen = Pipeline(latent_bundle), Sampler(vae_mode="tiling"), []
    images = pipe(PEA, sampler=tiling, callback=lambda step, shown: seen.append(shown))
    assert np.abs(seen[-1].astype(int) - images).max() <= 1
    assert vae_modes["decode"] == {"tiling"}


def test_another_autoencoder_of_the_same_latents_may_decode_previews(latent_bundle, tmp_path):
    spec = latent_bundle.spec
    tiny = dataclasses.replace(spec.autoencoder, block_out_channels=(4, 4))
    build = bind_init(AutoencoderConfig.build, tiny)
    own = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), abstract_params(build))
    write_bundle(tmp_path / "tiny", Bundle(tiny, own, {}), dtype="float32")
    pipe = Pipeline(latent_bundle)
    assert pipe.with_autoencoder(tmp_path / "tiny").spec.autoencoder == tiny
    write_bundle(tmp_path / "other", Bundle(dataclasses.replace(tiny, latent_channels=3), own, {}))
    with pytest.raises(UserError):
        pipe.with_autoencoder(tmp_path / "other")
    with pytest.raises(UserError, match="is no autoencoder for the latents of tiny"):
        pipe.with_autoencoder("shipped:produce_clip")
