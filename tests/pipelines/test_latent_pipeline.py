"""A pipeline that draws latents, and the autoencoder that makes images of them."""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath
from jaxdiff.models.components import Latents

from jaxdiff.errors import UserError
from jaxdiff.io.images import to_uint8
from jaxdiff.models.autoencoders.kl import Autoencoder, AutoencoderConfig
from jaxdiff.models.layers import abstract_params, any_rngs, bind_init, merge
from jaxdiff.pipelines.pipeline import Pipeline, load
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.load import write_bundle, write_weights
from jaxdiff.sampling.sampler import SamplingConfig
from jaxdiff.sampling.solvers_ode import DDIM
from jaxdiff.training.tasks.base import from_uint8

PEA = "a small red pea"


def test_latents_are_decoded(tiny_bundle, tmp_path):
    small = AutoencoderConfig(
        latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
    )
    task = tiny_bundle.config.task
    task = dataclasses.replace(
        task,
        denoiser=dataclasses.replace(task.denoiser, channels=4, patch_size=4, depth=1),
        latents=Latents(model=small, pretrained="unused"),
    )
    config = dataclasses.replace(
        tiny_bundle.config, task=task, sampling=SamplingConfig(solver=DDIM(), num_steps=1)
    )
    params = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, np.float32),
        abstract_params(lambda: task.build(any_rngs())),
    )
    draw = np.random.default_rng(1)
    build = bind_init(Autoencoder, small)
    autoencoder = jax.tree.map(
        lambda leaf: draw.normal(0, 0.1, leaf.shape).astype(np.float32), abstract_params(build)
    )
    bundle = Bundle(config, params, {"autoencoder": autoencoder}, tiny_bundle.tokenizer)

    write_bundle(tmp_path / "model", bundle, dtype="float32")
    drawn = load(str(tmp_path / "model"))([PEA])
    assert drawn.shape == (1, 32, 32, 3)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    back = Pipeline(bundle).autoencode(images)

    @jax.jit
    def there_and_back(params, images):
        model = merge(build, params)
        return model.decode(model.encode(from_uint8(images)).mode())

    expected = to_uint8(there_and_back(autoencoder, images))
    assert np.abs(back.astype(int) - expected).max() <= 1  # sums of another batch size
    with pytest.raises(UserError, match="multiples of 8"):
        Pipeline(bundle)([PEA], size=(20, 32))

    write_weights(epath.Path(tmp_path / "model" / "model.safetensors"), params=params)
    with pytest.raises(UserError, match=r"frozen\.autoencoder\."):
        load(str(tmp_path / "model"))
