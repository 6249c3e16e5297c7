import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import (
    Autoencoder,
    AutoencoderConfig,
    Gaussian,
    SpatialAttention,
)
from jaxdiff.models.layers import abstract_params, any_rngs


def config(**changes) -> AutoencoderConfig:
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return AutoencoderConfig(**(sizes | changes))


def build(config: AutoencoderConfig):
    """The graph and the parameters, made by one compiled program: quicker than one for each."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Autoencoder(config, rngs=any_rngs())))
    return graphdef, jax.jit(lambda: nnx.state(Autoencoder(config, rngs=nnx.Rngs(0))))()


def images() -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1, maxval=1)


def there_and_back(config: AutoencoderConfig):
    def run(x):
        model = Autoencoder(config, rngs=nnx.Rngs(0))
        z = model.encode(x)
        return z, model.decode(z.mode())

    return run


def gaussian() -> Gaussian:
    key, other = jax.random.split(jax.random.key(2))
    shape = (3, 2, 2, 4)
    return Gaussian(jax.random.normal(key, shape), jax.random.normal(other, shape))


@pytest.mark.parametrize("mid_block_add_attention", [True, False])
@pytest.mark.parametrize("widths", [(8,), (8, 16, 16)])
def test_each_level_but_the_last_halves_the_sides_and_decoding_restores_them(
    widths, mid_block_add_attention
):
    sizes = config(
        block_out_channels=widths,
        latent_channels=5,
        mid_block_add_attention=mid_block_add_attention,
    )
    z, decoded = jax.eval_shape(there_and_back(sizes), images())
    assert sizes.downsampling == 2 ** (len(widths) - 1)
    assert z.mean.shape == (2, 8 // sizes.downsampling, 8 // sizes.downsampling, 5)
    assert decoded.shape == (2, 8, 8, 3)


def test_patches_of_pixels_enter_and_leave_as_channels():
    sizes = config(block_out_channels=(8, 16), patch_size=2, latent_channels=5)
    z, decoded = jax.eval_shape(there_and_back(sizes), images())
    assert sizes.downsampling == 4
    assert z.mean.shape == (2, 2, 2, 5)
    assert decoded.shape == (2, 8, 8, 3)
    params = abstract_params(lambda: Autoencoder(sizes, rngs=any_rngs()))
    assert params["encoder"]["conv_in"]["kernel"].shape == (3, 3, 12, 8)
    assert params["decoder"]["conv_out"]["kernel"].shape == (3, 3, 8, 12)


@pytest.mark.parametrize("name", ["use_quant_conv", "use_post_quant_conv"])
def test_the_1x1_convolutions_are_optional(name):
    sizes, conv = config(**{name: False}), name.removeprefix("use_")
    assert conv in abstract_params(lambda: Autoencoder(config(), rngs=any_rngs()))
    assert conv not in abstract_params(lambda: Autoencoder(sizes, rngs=any_rngs()))
    assert jax.eval_shape(there_and_back(sizes), images())[1].shape == (2, 8, 8, 3)


def test_attention_is_a_softmax_over_all_positions():
    attention = SpatialAttention(8, config(), nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 8))
    y = attention.norm(x).reshape(2, 12, 8)
    q, k, v = attention.q(y), attention.k(y), attention.v(y)
    weights = jax.nn.softmax(q @ k.swapaxes(1, 2) / 8**0.5, axis=-1)
    expected = x + attention.out(weights @ v).reshape(x.shape)
    np.testing.assert_allclose(attention(x), expected, atol=1e-5)


def test_downsampling_pads_the_far_sides_alone():
    encoder = nnx.eval_shape(lambda: Autoencoder(config(), rngs=any_rngs())).encoder
    conv = encoder.levels[0].resample
    first_tap = jnp.zeros((3, 3, 8, 8)).at[0, 0].set(jnp.eye(8))
    nnx.update(conv, {"kernel": first_tap, "bias": jnp.zeros(8)})
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 8))
    np.testing.assert_allclose(conv(x), x[:, ::2, ::2], rtol=1e-6, atol=1e-6)


def test_sides_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"10x8.*multiples of 4"):
        jax.eval_shape(
            there_and_back(config(block_out_channels=(8, 8, 8))), jnp.zeros((1, 8, 10, 3))
        )


def test_groups_that_do_not_divide_the_widths_are_refused():
    with pytest.raises(UserError, match="4 norm groups do not divide the width 10"):
        config(block_out_channels=(8, 10))


def test_kl_equals_the_integral():
    one = Gaussian(jnp.full((1, 1, 1, 1), 0.7), jnp.full((1, 1, 1, 1), -0.9))
    x = np.linspace(-12, 12, 200_001)
    std = np.exp(-0.9 / 2)
    log_p = -(((x - 0.7) / std) ** 2) / 2 - np.log(std)
    integrand = np.exp(log_p) / np.sqrt(2 * np.pi) * (log_p + x**2 / 2)
    np.testing.assert_allclose(one.kl()[0], np.trapezoid(integrand, x), rtol=1e-5)


def test_kl_sums_over_z_and_is_zero_for_the_unit_normal():
    several = gaussian()
    each = Gaussian(*(v.reshape(-1, 1, 1, 1) for v in several)).kl()
    np.testing.assert_allclose(several.kl(), each.reshape(3, -1).sum(axis=1), rtol=1e-5)
    assert (Gaussian(jnp.zeros((2, 1, 1, 3)), jnp.zeros((2, 1, 1, 3))).kl() == 0).all()


def test_samples_have_the_mean_and_the_deviation():
    many = Gaussian(jnp.full((1, 100, 100, 4), 2.0), jnp.full((1, 100, 100, 4), np.log(0.25)))
    z = many.sample(RowKeys.whole(jax.random.key(0), 1))
    np.testing.assert_allclose(z.mean(), 2, atol=0.01)
    np.testing.assert_allclose(z.std(), 0.5, atol=0.01)


def test_a_sample_depends_on_the_row_in_the_batch_and_not_on_the_micro_batch():
    keys = RowKeys.whole(jax.random.key(0), 3)
    together = gaussian().sample(keys)
    last = jax.tree.map(lambda x: x[2:], (gaussian(), keys.rows))
    alone = last[0].sample(RowKeys(keys.key, last[1], 3))
    np.testing.assert_array_equal(together[2:], alone)


def test_latents_are_shifted_then_scaled_and_back():
    sizes = config(scaling_factor=0.5, shift_factor=3.0)
    model = nnx.eval_shape(lambda: Autoencoder(sizes, rngs=any_rngs()))
    z = gaussian().mean
    np.testing.assert_allclose(model.to_latents(z), (z - 3) / 2, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model.from_latents(model.to_latents(z)), z, rtol=1e-6, atol=1e-6)


def test_remat_changes_no_gradient_and_stores_less():
    def loss_of(remat):
        sizes = config(remat=remat, block_out_channels=(8,), mid_block_add_attention=False)
        graphdef, params = build(sizes)

        def loss(params):
            model = nnx.merge(graphdef, params)
            z = model.encode(images())
            return jnp.mean((model.decode(z.mode()) - images()) ** 2) + z.kl().mean()

        return loss, params

    (plain, params), (remat, _) = loss_of("none"), loss_of("full")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
        jax.jit(jax.grad(plain))(params),
        jax.jit(jax.grad(remat))(params),
    )

    def residuals(loss):
        _, pullback = jax.eval_shape(lambda params: jax.vjp(loss, params), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert residuals(remat) < residuals(plain)


def test_bf16_weights_compute_in_bf16():
    graphdef, params = build(config())

    @jax.jit
    def run(params, x):
        model = nnx.merge(graphdef, params)
        z = model.encode(x)
        return z, model.decode(z.mode())

    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    lines = str(jax.make_jaxpr(run)(half, images())).splitlines()
    products = [x for x in lines if "= conv_general_dilated" in x or "= dot_general" in x]
    assert len(products) > 20
    # The logits of attention alone leave their product in float32, for the softmax.
    assert sum(":bf16[" not in line for line in products) == 2
    assert {x.dtype for x in jax.tree.leaves(run(half, images()))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(run(half, images())[0].mean, run(params, images())[0].mean, atol=0.1)
