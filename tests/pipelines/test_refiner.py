"""Which models may take over as a refiner, and what they take over."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxdiff.diffusion.schedules import Cosine
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.layers import init_params
from jaxdiff.pipelines.generate import generate
from jaxdiff.pipelines.latent_spaces import have_same_latents
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.refiner import load_refiner
from jaxdiff.pipelines.resolve import CommandDefaults, resolve_settings
from jaxdiff.pipelines.settings import GenerationSettings
from jaxdiff.pretrained.bundle import write_bundle
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import DDIM, Euler

AUTOENCODER = AutoencoderConfig(
    latent_channels=3, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4
)


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    """The tiny model on latents."""
    spec = dataclasses.replace(
        tiny_bundle.spec, autoencoder=AUTOENCODER, sampler=Sampler(solver=DDIM(), num_steps=4)
    )
    params = init_params(lambda rngs: AUTOENCODER.build(rngs=rngs), nnx.Rngs(0))
    return tiny_bundle._replace(spec=spec, params={**tiny_bundle.params, "autoencoder": params})


def _with(bundle, autoencoder=None, **changes):
    """Return a bundle with a changed specification, and changed weights of the autoencoder."""
    params = {**bundle.params, "autoencoder": autoencoder or bundle.params["autoencoder"]}
    return bundle._replace(spec=dataclasses.replace(bundle.spec, **changes), params=params)


def _changed(bundle, part):
    """Return the autoencoder's weights with those of one part changed."""
    params = bundle.params["autoencoder"]
    return {**params, part: jax.tree.map(lambda x: 1.5 * x + 0.1, params[part])}


def test_a_model_that_takes_over_from_itself_gives_its_own_image(bundle, tmp_path):
    """Also where its folder has another decoder, solver and time grid: the first one's count."""
    pipe = Pipeline(bundle)
    other = Sampler(solver=Euler(), grid=TimeGrid(rho=2.0), num_steps=7)
    refiner = _with(bundle, _changed(bundle, "decoder"), sampler=other)
    write_bundle(tmp_path, refiner, "float32")
    command = CommandDefaults(refiner_model=str(tmp_path))
    asked = GenerationSettings(prompt="a small red pea", seed=3, refiner_start=0.5)
    images = generate(pipe, [resolve_settings(asked, pipe, command)]).images
    whole = pipe("a small red pea", seeds=3)
    np.testing.assert_allclose(images.astype(int), whole.astype(int), atol=1)
    assert not np.array_equal(Pipeline(refiner)("a small red pea", seeds=3), whole)


def test_a_refiner_that_does_not_fit_is_refused(bundle, tmp_path):
    pipe = Pipeline(bundle)
    scaled = dataclasses.replace(AUTOENCODER, scaling_factor=2 * AUTOENCODER.scaling_factor)
    wrong = {
        "other latents than": _with(bundle, autoencoder=_changed(bundle, "encoder")),
        "other latents": _with(bundle)._replace(
            spec=dataclasses.replace(bundle.spec, autoencoder=scaled)
        ),
        "another schedule": _with(bundle, schedule=Cosine()),
    }
    for i, (message, refiner) in enumerate(wrong.items()):
        write_bundle(tmp_path / str(i), refiner, "float32")
        with pytest.raises(UserError, match=f"--refiner-model .* has {message}"):
            load_refiner(pipe, str(tmp_path / str(i)))
    with pytest.raises(UserError, match="is of type ClipConfig: expected a text-to-image model"):
        load_refiner(pipe, "shipped:produce_clip")


def test_the_precision_of_weights_does_not_change_the_latents(bundle):
    for kind in ("int8", "fp8"):
        quantized = bundle._replace(params=bundle.spec.quantize(bundle.params, kind))
        assert have_same_latents(quantized, bundle)
    half = jax.tree.map(lambda x: x.astype(np.float16), bundle.params)
    assert have_same_latents(bundle._replace(params=half), bundle)
