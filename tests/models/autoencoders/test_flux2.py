import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.flux2 import (
    Flux2Autoencoder,
    Flux2AutoencoderConfig,
    pack_latents,
    unpack_latents,
)
from jaxdiff.models.layers import abstract_params, any_rngs, bind_init, bind_params

SMALL = Flux2AutoencoderConfig(
    z_channels=3,
    block_out_channels=(4, 8),
    decoder_block_out_channels=(4, 4),
    layers_per_block=1,
    norm_num_groups=2,
)


@pytest.fixture(scope="module")
def model():
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(SMALL.build(rngs=nnx.Rngs(0)))))()
    rng = np.random.default_rng(0)
    params["bn"]["running_mean"] = jnp.asarray(rng.normal(size=12), jnp.float32)
    params["bn"]["running_var"] = jnp.asarray(rng.uniform(1, 4, size=12), jnp.float32)
    return bind_params(bind_init(Flux2Autoencoder, SMALL), params)


def test_it_has_the_published_size():
    params = abstract_params(lambda: Flux2Autoencoder(Flux2AutoencoderConfig(), rngs=any_rngs()))
    sizes = {part: sum(x.size for x in jax.tree.leaves(params[part])) for part in params}
    assert sum(sizes.values()) == 84_046_372  # as diffusers' defaults
    assert sizes["bn"] == 2 * 128 + 1


def test_packing_keeps_channels_together():
    z = jnp.arange(2.0 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    packed = pack_latents(z)
    assert packed.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(packed[1, 1, 2, 4:8], z[1, 2:4, 4:6, 1].ravel())
    np.testing.assert_array_equal(unpack_latents(packed), z)


def test_images_become_latents_and_images_again(model):
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)), jnp.float32)
    z = jax.jit(model.encode)(images)
    assert z.mean.shape == (2, 2, 3, SMALL.latent_channels)
    np.testing.assert_array_equal(z.sample(RowKeys.whole(jax.random.key(0), 2)), z.mode())
    latents = model.to_latents(z.mean)
    assert np.abs(latents - z.mean).max() > 0.1
    np.testing.assert_allclose(model.from_latents(latents), z.mean, rtol=0, atol=1e-6)
    back = jax.jit(model.decode)(z.mean)
    assert back.shape == images.shape
    by_tiles = jax.jit(lambda z: model.decode(z, "slicing"))(z.mean)
    np.testing.assert_allclose(by_tiles, back, rtol=0, atol=1e-5)


def test_sides_that_do_not_pack_are_refused(model):
    with pytest.raises(UserError, match="multiples of 4; crop"):
        model.encode(jnp.zeros((1, 8, 10, 3)))


def test_halves_of_different_depths_are_refused():
    with pytest.raises(UserError, match="expected 4 widths"):
        Flux2AutoencoderConfig(decoder_block_out_channels=(32,))


def test_flops_count_both_halves():
    size = {"height": 64, "width": 32}
    same = SMALL.encoder
    assert SMALL.encode_flops(**size) == same.encode_flops(**size)
    assert SMALL.decode_flops(**size) == SMALL.decoder.decode_flops(**size)
    assert SMALL.decode_flops(**size) < same.decode_flops(**size)
