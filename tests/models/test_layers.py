import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.initializers import NoRngs
from jaxdiff.models.layers import (
    abstract_params,
    any_rngs,
    apply_rope,
    axial_angles,
    bind_init,
    bind_params,
    patchify,
    pooled_token_sum,
    unpatchify,
)


def test_the_pooled_sum_is_that_of_the_tokens_under_the_mask():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(2, 6, 8)).astype(np.float32)
    mask = np.arange(6) < np.array([[2], [6]])
    found = pooled_token_sum(jnp.asarray(tokens), jnp.asarray(mask))
    expected = [2 * tokens[0, :2].sum(0) / 2**0.5, 2 * tokens[1].sum(0) / 6**0.5]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_prompts_that_differ_in_half_of_their_tokens_have_a_variance_of_two():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(500, 12, 64)).astype(np.float32)
    tokens[:, :6] = tokens[0, :6]
    found = np.asarray(pooled_token_sum(jnp.asarray(tokens), jnp.ones((500, 12), bool)))
    # Of 12 tokens 6 differ: 2^2 * 6 / 12 = 2 is their variance.
    assert abs(found.var(axis=0).mean() - 2.0) < 0.1


def test_random_numbers_equal_those_of_flaxs_own_generator():
    """Also where JAX reads the count after the next number was generated."""
    ours, theirs = any_rngs(), nnx.Rngs(0)
    keys = [[jax.random.key_data(rngs.params()) for _ in range(9)] for rngs in (ours, theirs)]
    np.testing.assert_array_equal(*keys)
    read = ours.default.count[...]
    ours.params()
    assert (int(read), int(ours.default.count[...])) == (9, 10)


@pytest.mark.parametrize(
    "config",
    [DiTConfig(), UNet2DConditionConfig(block_out_channels=(32,) * 4), AutoencoderConfig()],
)
def test_a_module_without_random_numbers_has_the_shapes_and_axes_of_one_with_them(config):
    def described(make_rngs):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=make_rngs())))
        leaves = nnx.to_flat_state(state)
        return graphdef, [(path, p.shape, p.dtype, p.get_metadata()) for path, p in leaves]

    assert described(NoRngs) == described(any_rngs)


def test_equal_configs_are_traced_once_and_modules_share_nothing():
    traced = []

    def make(width, rngs):
        traced.append(width)
        return nnx.Linear(width, 2, rngs=rngs)

    abstract_params(bind_init(make, 3)).pop("kernel")  # is the caller's own
    params = {"kernel": np.full((3, 2), 2.0), "bias": np.zeros(2)}
    found = jax.tree.map(lambda x: x.shape, abstract_params(bind_init(make, 3)))
    assert found == {"kernel": (3, 2), "bias": (2,)}
    models = [bind_params(bind_init(make, 3), params) for _ in range(2)]
    assert traced == [3]
    np.testing.assert_array_equal(models[0](jnp.ones((1, 3))), [[6, 6]])
    models[0].kernel = nnx.Param(jnp.zeros((3, 2)))
    np.testing.assert_array_equal(models[1](jnp.ones((1, 3))), [[6, 6]])
    assert abstract_params(bind_init(make, 4))["kernel"].shape == (4, 2)


def test_interleaved_rotation_multiplies_complex_pairs_by_the_phases_of_their_axes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 2, 10)).astype(np.float32)
    positions = np.array([[0, 5], [2, 1], [7, 3]])
    angles = axial_angles(jnp.asarray(positions), (4, 6), 100.0)
    found = np.asarray(apply_rope(jnp.asarray(x), angles, interleaved=True))
    rates = [100.0 ** (-np.arange(0, width, 2) / width) for width in (4, 6)]
    expected = np.concatenate([positions[:, :1] * rates[0], positions[:, 1:] * rates[1]], axis=1)
    phases = np.exp(1j * expected)[None, :, None]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * phases
    np.testing.assert_allclose(found[..., 0::2], turned.real, atol=1e-5)
    np.testing.assert_allclose(found[..., 1::2], turned.imag, atol=1e-5)
    by_image = apply_rope(jnp.asarray(x), jnp.stack([angles, angles]), interleaved=True)
    np.testing.assert_array_equal(by_image, found)


def test_patches_with_channels_first_are_the_others_in_another_order():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, 3)), jnp.float32)
    first = patchify(x, 2, channels_first=True)
    assert first.shape == (2, 6, 12)
    np.testing.assert_array_equal(
        first.reshape(2, 6, 3, 2, 2).transpose(0, 1, 3, 4, 2).reshape(2, 6, 12), patchify(x, 2)
    )
    np.testing.assert_array_equal(unpatchify(first, 2, 3, 2, channels_first=True), x)
