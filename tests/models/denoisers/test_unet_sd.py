import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig, UNet2DConditionModel
from jaxdiff.models.layers import abstract_params, any_rngs, bind_params

TINY = UNet2DConditionConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    transformer_layers=(0, 2),
    middle_transformer_layers=2,
    heads=(2, 2),
    cross_attention_dim=6,
    norm_num_groups=4,
)
XL = dataclasses.replace(TINY, added_width=5 + 6 * 4, time_id_width=4)


def params_of(config):
    rng = np.random.default_rng(0)
    abstract = abstract_params(lambda: UNet2DConditionModel(config, rngs=any_rngs()))
    return jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), abstract)


def call(config, params, x, t, cond):
    model = bind_params(lambda: UNet2DConditionModel(config, rngs=any_rngs()), params)
    return model(x, t, cond)


def inputs(height=4, width=6):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, height, width, 4)), jnp.float32)
    tokens = jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32)
    return x, jnp.array([0.3, 0.9]), Conditioning(tokens)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=["even", "odd"])
def test_the_prediction_has_the_latents_shape(size):
    params = params_of(TINY)
    out = jax.eval_shape(lambda p: call(TINY, p, *inputs(*size)), params)
    assert out.shape == (2, *size, 4)
    assert out.dtype == jnp.float32


def test_time_and_text_matter_and_neighbours_in_the_batch_do_not():
    run = jax.jit(lambda *args: call(TINY, params_of(TINY), *args))
    x, t, cond = inputs()
    plain = run(x, t, cond)
    for other in (
        run(x, t.at[0].set(0.5), cond),
        run(x, t, Conditioning(cond.tokens.at[0].multiply(-1))),
    ):
        assert not np.allclose(other[0], plain[0])
        np.testing.assert_array_equal(other[1], plain[1])


def test_size_and_crop_matter_to_xl():
    params = params_of(XL)
    x, t, cond = inputs()
    size_crop = jnp.tile(jnp.array([64.0, 48, 0, 0, 32, 32]), (2, 1))
    whole = cond._replace(pooled=jnp.ones((2, 5)), size_crop=size_crop)
    run = jax.jit(lambda cond: call(XL, params, x, t, cond))
    cropped = whole._replace(size_crop=size_crop.at[0, 3].set(16))
    difference = np.abs(run(whole) - run(cropped)).max(axis=(1, 2, 3))
    assert difference[0] > 0
    assert difference[1] == 0


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"pooled": jnp.ones((2, 5))},
        {"pooled": jnp.ones((2, 9)), "size_crop": jnp.ones((2, 6))},
    ],
    ids=["nothing", "no size", "a pooled vector of another width"],
)
def test_missing_conditioning_is_reported(given):
    x, t, cond = inputs()
    with pytest.raises(UserError, match="pooled and size_crop"):
        jax.eval_shape(lambda p: call(XL, p, x, t, cond._replace(**given)), params_of(XL))


def test_remat_changes_no_gradient():
    one_level = dataclasses.replace(
        TINY, block_out_channels=(8,), transformer_layers=(0,), heads=(2,)
    )
    params, (x, t, cond) = params_of(one_level), inputs()

    def gradient(remat):
        config = dataclasses.replace(one_level, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.mean(call(config, p, x, t, cond) ** 2)))(params)

    plain, again = gradient("none"), gradient("full")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


@pytest.mark.parametrize(
    "changes", [{"heads": (2,)}, {"heads": (3, 2)}, {"norm_num_groups": 3}], ids=str
)
def test_sizes_that_do_not_fit_are_refused(changes):
    with pytest.raises(UserError, match="UNet2DCondition"):
        dataclasses.replace(TINY, **changes)


REFINER = dataclasses.replace(TINY, added_width=5 + 5 * 4, time_id_width=4)


def test_the_refiner_reads_an_aesthetic_score_in_place_of_the_target_size():
    params = params_of(REFINER)
    x, t, cond = inputs()
    size_crop = jnp.tile(jnp.array([64.0, 48, 0, 0, 32, 32]), (2, 1))
    run = jax.jit(lambda cond: call(REFINER, params, x, t, cond))
    given = cond._replace(
        pooled=jnp.ones((2, 5)), size_crop=size_crop, aesthetic_score=jnp.array([6.0, 6.0])
    )
    plain = run(given)
    scored = run(given._replace(aesthetic_score=jnp.array([2.5, 6.0])))
    difference = np.abs(plain - scored).max(axis=(1, 2, 3))
    assert difference[0] > 0
    assert difference[1] == 0
    np.testing.assert_array_equal(run(given._replace(size_crop=size_crop.at[:, 4:].set(99))), plain)
    with pytest.raises(UserError, match="pooled and size_crop"):
        run(given._replace(aesthetic_score=None))


def test_an_inpainting_network_reads_mask_and_masked_latents():
    inpainting = dataclasses.replace(TINY, in_channels=9)
    assert inpainting.extra_channels == 5
    params = params_of(inpainting)
    x, t, cond = inputs()
    run = jax.jit(lambda cond: call(inpainting, params, x, t, cond))
    concat = jnp.ones((*x.shape[:3], 5))
    plain = run(cond._replace(concat=concat))
    assert plain.shape == x.shape
    other = run(cond._replace(concat=concat.at[0].multiply(-1)))
    assert not np.allclose(other[0], plain[0])
    np.testing.assert_array_equal(other[1], plain[1])


@pytest.mark.parametrize("channels", [5, 7, 8, 3])
def test_inputs_are_latents_or_those_of_inpainting(channels):
    with pytest.raises(UserError, match=f"in_channels is {channels} for .* or 9 with the mask"):
        dataclasses.replace(TINY, in_channels=channels)
