import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.unet_sd import (
    Conditions,
    UNet2DConditionConfig,
    UNet2DConditionModel,
)
from jaxdiff.models.layers import abstract_params, any_rngs, merge

TINY = UNet2DConditionConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    transformer_layers=(0, 2),
    middle_transformer_layers=2,
    heads=(2, 2),
    cross_attention_dim=6,
    norm_num_groups=4,
)
XL = dataclasses.replace(TINY, added_width=5 + 2 * 4, time_id_width=4)


def params_of(config):
    draw = np.random.default_rng(0)
    abstract = abstract_params(lambda: UNet2DConditionModel(config, rngs=any_rngs()))
    return jax.tree.map(lambda x: 0.2 * draw.normal(size=x.shape).astype(np.float32), abstract)


def call(config, params, x, t, conditions):
    model = merge(lambda: UNet2DConditionModel(config, rngs=any_rngs()), params)
    return model(x, t, conditions)


def inputs(height=4, width=6):
    draw = np.random.default_rng(1)
    x = jnp.asarray(draw.normal(size=(2, height, width, 4)), jnp.float32)
    tokens = jnp.asarray(draw.normal(size=(2, 3, 6)), jnp.float32)
    return x, jnp.array([0.3, 0.9]), Conditions(tokens)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=["even", "odd"])
def test_the_prediction_has_the_latents_shape(size):
    params = params_of(TINY)
    out = jax.eval_shape(lambda p: call(TINY, p, *inputs(*size)), params)
    assert out.shape == (2, *size, 4)
    assert out.dtype == jnp.float32


def test_time_and_text_matter_and_neighbours_in_the_batch_do_not():
    run = jax.jit(lambda *args: call(TINY, params_of(TINY), *args))
    x, t, conditions = inputs()
    plain = run(x, t, conditions)
    for other in (
        run(x, t.at[0].set(0.5), conditions),
        run(x, t, Conditions(conditions.tokens.at[0].multiply(-1))),
    ):
        assert not np.allclose(other[0], plain[0])
        np.testing.assert_array_equal(other[1], plain[1])


def test_size_and_crop_matter_to_xl():
    params = params_of(XL)
    x, t, conditions = inputs()
    told = conditions._replace(pooled=jnp.ones((2, 5)), time_ids=jnp.array([[64.0, 0], [64, 0]]))
    run = jax.jit(lambda told: call(XL, params, x, t, told))
    cropped = told._replace(time_ids=jnp.array([[64.0, 32], [64, 0]]))
    difference = np.abs(run(told) - run(cropped)).max(axis=(1, 2, 3))
    assert difference[0] > 0
    assert difference[1] == 0


@pytest.mark.parametrize(
    "told",
    [{}, {"pooled": jnp.ones((2, 5))}, {"pooled": jnp.ones((2, 5)), "time_ids": jnp.ones((2, 3))}],
    ids=["nothing", "no numbers", "too many numbers"],
)
def test_missing_conditions_are_told(told):
    x, t, conditions = inputs()
    with pytest.raises(UserError, match="pooled and time_ids"):
        jax.eval_shape(lambda p: call(XL, p, x, t, conditions._replace(**told)), params_of(XL))


def test_remat_changes_no_gradient():
    one_level = dataclasses.replace(
        TINY, block_out_channels=(8,), transformer_layers=(0,), heads=(2,)
    )
    params, (x, t, conditions) = params_of(one_level), inputs()

    def gradient(remat):
        config = dataclasses.replace(one_level, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.mean(call(config, p, x, t, conditions) ** 2)))(params)

    plain, again = gradient("none"), gradient("full")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


@pytest.mark.parametrize(
    "changes", [{"heads": (2,)}, {"heads": (3, 2)}, {"norm_num_groups": 3}], ids=str
)
def test_sizes_that_do_not_fit_are_refused(changes):
    with pytest.raises(UserError, match="UNet2DCondition"):
        dataclasses.replace(TINY, **changes)
