"""Images that continue at their other side: rolling the input rolls the output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.models.autoencoders.kl import Autoencoder, AutoencoderConfig
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.convolutions import Conv, wrap_convolutions
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig, UNet2DConditionModel


def unet():
    config = UNet2DConditionConfig(
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers=(1, 0),
        heads=(2, 2),
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    text = Conditioning(jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 8)), jnp.float32))
    model = UNet2DConditionModel(config, rngs=nnx.Rngs(0))
    return model, lambda x: model(x, jnp.float32([0.5]), text)


def autoencoder():
    config = AutoencoderConfig(
        image_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
    )
    model = Autoencoder(config, rngs=nnx.Rngs(0))
    return model, lambda x: model.decode(model.encode(x).mean)


X = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 4)), jnp.float32)


@pytest.mark.parametrize(
    ("make", "wrap"),
    [
        pytest.param(unet, (True, True), marks=pytest.mark.nightly),
        (autoencoder, (True, True)),
        (autoencoder, (False, True)),
    ],
)
def test_networks_that_wrap_have_no_edge(make, wrap):
    model, call = make()
    wrap_convolutions(model, wrap)
    call = jax.jit(call)
    plain = call(X)
    for axis, wraps in zip((1, 2), wrap, strict=True):
        off = float(jnp.abs(call(jnp.roll(X, 2, axis)) - jnp.roll(plain, 2, axis)).max())
        assert off < 1e-4 if wraps else off > 1e-2  # zero padding shows the edges


def test_without_wrap_nothing_changes():
    layer = Conv(4, 4, 3, 2, nnx.Rngs(0))
    before = layer(X)
    wrap_convolutions(nnx.List([layer]), (False, False))
    np.testing.assert_array_equal(layer(X), before)
    jax.tree.map(np.testing.assert_array_equal, layer.padding, ((1, 1), (1, 1)))
