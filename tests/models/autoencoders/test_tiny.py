import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.tiny import TinyAutoencoder, TinyAutoencoderConfig
from jaxdiff.models.layers import abstract_params, any_rngs, bind_init, bind_params

TINY = TinyAutoencoderConfig(width=4, encoder_blocks=(1, 1), decoder_blocks=(1, 1), sample_size=8)


@pytest.fixture(scope="module")
def model():
    params = jax.jit(lambda: nnx.state(TinyAutoencoder(TINY, rngs=nnx.Rngs(0))))()
    return bind_params(bind_init(TinyAutoencoder, TINY), params)


def test_it_has_the_published_size():
    params = abstract_params(lambda: TinyAutoencoder(TinyAutoencoderConfig(), rngs=any_rngs()))
    count = {half: sum(x.size for x in jax.tree.leaves(params[half])) for half in params}
    assert count == {"encoder": 1_222_532, "decoder": 1_222_531}


def test_images_become_latents_and_images_again(model):
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)), jnp.float32)
    z = jax.jit(model.encode)(images)
    assert z.mean.shape == (2, 4, 6, 4)
    np.testing.assert_array_equal(z.sample(RowKeys.whole(jax.random.key(0), 2)), z.mode())
    np.testing.assert_array_equal(model.from_latents(model.to_latents(z.mean)), z.mean)
    back = jax.jit(model.decode)(z.mean)
    assert back.shape == images.shape
    by_tiles = jax.jit(lambda z: model.decode(z, "tiling"))(z.mean)
    assert by_tiles.shape == images.shape


@pytest.mark.parametrize("sample_size", [1, 2, 12])
def test_tiles_of_any_size_give_whole_images(sample_size):
    config = dataclasses.replace(TINY, sample_size=sample_size)
    params = abstract_params(bind_init(TinyAutoencoder, config))

    def back(params, images):
        model = bind_params(bind_init(TinyAutoencoder, config), params)
        return model.decode(model.encode(images, "tiling").mean, "tiling")

    images = jax.ShapeDtypeStruct((1, 8, 20, 3), jnp.float32)
    assert jax.eval_shape(back, params, images).shape == images.shape


def test_large_latents_are_squeezed(model):
    z = jnp.full((1, 2, 2, 4), 1e4)
    decode = jax.jit(model.decode)
    np.testing.assert_allclose(decode(z), decode(jnp.full((1, 2, 2, 4), 50.0)), atol=1e-5)


def test_halves_of_different_depths_are_refused():
    with pytest.raises(UserError, match="differ in length"):
        TinyAutoencoderConfig(encoder_blocks=(1,))
