import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.unet_small import UNet, UNetConfig
from jaxdiff.models.layers import abstract_params, any_rngs

TINY = UNetConfig(
    patch_size=2,
    widths=(8, 16),
    attention=(False, True),
    heads=2,
    groups=4,
    text_width=8,
    pooled_width=8,
)


@functools.cache
def first_params():
    """As initialised, and with a last layer that is not zero, as it is and the output with it."""
    params = nnx.to_pure_dict(jax.jit(lambda: nnx.state(UNet(TINY, rngs=nnx.Rngs(0))))())
    kernel = params["final"]["kernel"]
    random = jax.random.normal(jax.random.key(1), (kernel.size,)).reshape(kernel.shape)
    return params, {**params, "final": {**params["final"], "kernel": random}}


@functools.partial(jax.jit, static_argnames="config")
def apply(params, x, t, text, config=TINY):
    graphdef = nnx.split(nnx.eval_shape(lambda: UNet(config, rngs=any_rngs())))[0]
    return nnx.merge(graphdef, params)(x, t, text)


def text(length: int = 3) -> Conditioning:
    tokens = jax.random.normal(jax.random.key(2), (2 * 5 * 8,)).reshape(2, 5, 8)
    mask = jnp.broadcast_to(jnp.arange(5) < length, (2, 5))
    return Conditioning(tokens, mask, tokens[:, 0])


def images(height: int = 8, width: int = 8) -> jax.Array:
    return jax.random.normal(jax.random.key(3), (2 * height * width * 3,)).reshape(
        2, height, width, 3
    )


T = jnp.array([0.2, 0.9])


def test_as_built_it_predicts_zero():
    assert not apply(first_params()[0], images(), T, text()).any()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 4)])
def test_the_output_has_the_shape_of_the_input(height, width):
    out = apply(first_params()[1], images(height, width), T, text())
    assert out.shape == (2, height, width, 3)
    assert out.dtype == jnp.float32


def test_it_reads_time_pooled_text_and_the_tokens_under_the_mask_alone():
    params, x = first_params()[1], images()
    base = apply(params, x, T, text())
    assert jnp.abs(apply(params, x, T + 0.05, text()) - base).max() > 1e-3
    assert jnp.abs(apply(params, x, T, text()._replace(pooled=-text().pooled)) - base).max() > 1e-3
    inside = text()._replace(tokens=text().tokens.at[:, 2].multiply(-1))
    assert jnp.abs(apply(params, x, T, inside) - base).max() > 1e-3
    beyond = text()._replace(tokens=text().tokens.at[:, 3:].multiply(-1))
    np.testing.assert_array_equal(apply(params, x, T, beyond), base)


def test_the_output_depends_on_the_position_in_the_image():
    flat = jnp.zeros((2, 8, 8, 3))
    out = apply(first_params()[1], flat, T, text())
    assert jnp.abs(out[:, :4] - out[:, 4:]).max() > 1e-3


def test_rematerialization_changes_no_gradient():
    one_level = dataclasses.replace(TINY, widths=(8,), attention=(True,))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32),
        abstract_params(lambda: UNet(one_level, rngs=any_rngs())),
    )

    def loss(params, config):
        return jnp.mean(apply(params, images(), T, text(), config) ** 2)

    kept = jax.grad(loss)(params, one_level)
    again = jax.grad(loss)(params, dataclasses.replace(one_level, remat="full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), kept, again)


def test_bfloat16_weights_compute_in_bfloat16():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), first_params()[1])
    jaxpr = str(jax.make_jaxpr(apply)(params, images(), T, text()))
    convolutions = [line for line in jaxpr.splitlines() if "conv_general_dilated[" in line]
    assert convolutions
    assert all(":bf16[" in line for line in convolutions)


def test_sides_that_do_not_halve_are_refused():
    with pytest.raises(UserError, match="multiples of 4"):
        apply(first_params()[1], images(6, 8), T, text())


def test_levels_without_their_attention_or_of_odd_widths_are_refused():
    with pytest.raises(UserError, match="one per level"):
        UNetConfig(widths=(64, 128))
    with pytest.raises(UserError, match="multiples"):
        UNetConfig(widths=(64, 100, 128))
