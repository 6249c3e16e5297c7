"""Z-Image's transformer: what its outputs depend on, and what they do not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.z_image import ZImageConfig
from jaxdiff.models.layers import abstract_params, bind_build, bind_params, cast, init_params
from jaxdiff.sampling.feature_cache import SplitNetwork

SMALL = ZImageConfig(
    channels=4,
    heads=2,
    depth=2,
    refiner_depth=1,
    text_width=8,
    rope_axes=(4, 6, 6),
    rope_lengths=(98, 16, 16),
)
LENGTHS = (3, 33)


@functools.cache
def weights():
    """Weights away from their initial zeros, which would hide what lies behind them."""
    rng = np.random.default_rng(1)
    params = abstract_params(bind_build(SMALL))
    return jax.tree.map(lambda p: jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype), params)


@functools.cache
def apply(config: ZImageConfig = SMALL):
    """(params, x, t, cond) -> output, compiled once per shape."""
    return jax.jit(lambda params, *inputs: bind_params(bind_build(config), params)(*inputs))


def inputs(height=4, width=6, lengths=LENGTHS):
    rng = np.random.default_rng(2)

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    mask = jnp.arange(max(lengths)) < jnp.array(lengths)[:, None]
    cond = Conditioning(tokens=random(2, max(lengths), 8), mask=mask)
    return random(2, height, width, SMALL.channels), jnp.array([0.3, 0.8]), cond


def test_it_has_the_published_size():
    params = abstract_params(bind_build(ZImageConfig()))
    assert sum(x.size for x in jax.tree.leaves(params)) == 6_154_908_736  # as diffusers' defaults


def test_the_output_has_the_shape_of_the_input_at_any_size():
    for height, width in ((4, 6), (16, 2)):
        x, t, cond = inputs(height, width)
        for params in (weights(), cast(weights(), "bfloat16")):
            shape = jax.eval_shape(apply(), params, x, t, cond)
            assert (shape.shape, shape.dtype) == (x.shape, jnp.float32)


def test_fresh_blocks_pass_their_input_and_the_output_is_zero():
    params = init_params(lambda rngs: SMALL.build(rngs=rngs), nnx.Rngs(0))
    assert not np.asarray(params["blocks"]["modulation"]["kernel"]).any()
    np.testing.assert_array_equal(apply()(params, *inputs()), np.zeros((2, 4, 6, 4)))


def test_masked_tokens_neighbours_and_the_padded_length_have_no_effect():
    x, t, cond = inputs()
    run = functools.partial(apply(), weights())
    y = run(x, t, cond)
    noise = jnp.where(cond.mask[..., None], cond.tokens, 100.0)
    np.testing.assert_array_equal(run(x, t, cond._replace(tokens=noise)), y)
    for i in range(2):
        others = run(x.at[1 - i].set(0), t, cond._replace(tokens=cond.tokens.at[1 - i].set(0)))
        np.testing.assert_array_equal(others[i], y[i])
    longer = Conditioning(
        tokens=jnp.pad(cond.tokens, ((0, 0), (0, 40), (0, 0)), constant_values=5),
        mask=jnp.pad(cond.mask, ((0, 0), (0, 40))),
    )
    np.testing.assert_allclose(run(x, t, longer), y, rtol=0, atol=1e-5)
    left = Conditioning(tokens=cond.tokens[:, ::-1], mask=cond.mask[:, ::-1])
    assert float(jnp.abs(run(x, t, left) - y).max()) > 1e-3  # the order of words


def test_each_input_counts():
    x, t, cond = inputs()
    run = functools.partial(apply(), weights())
    y = run(x, t, cond)
    changes = [
        (x + 0.1, t, cond),
        (x, t + 0.1, cond),
        (x, t, cond._replace(tokens=cond.tokens.at[:, 2].add(0.1))),
        (x, t, cond._replace(mask=cond.mask.at[:, 2].set(False))),
    ]
    for changed in changes:
        assert float(jnp.abs(run(*changed) - y).max(axis=(1, 2, 3)).min()) > 1e-3


def test_remat_and_a_mask_of_all_tokens_change_nothing():
    x, t, cond = inputs(lengths=(32, 32))
    y = apply()(weights(), x, t, cond)
    np.testing.assert_allclose(apply()(weights(), x, t, cond._replace(mask=None)), y, atol=1e-5)

    def loss(config, params):
        return jnp.sum(bind_params(bind_build(config), params)(x, t, cond) ** 2)

    plain, full = (
        jax.jit(jax.grad(functools.partial(loss, dataclasses.replace(SMALL, remat=remat))))(
            weights()
        )
        for remat in ("none", "full")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max()),
        plain,
        full,
    )


def test_its_three_parts_are_the_network():
    network = bind_params(bind_build(SMALL), weights())
    assert isinstance(network, SplitNetwork)
    arguments = inputs()

    @jax.jit
    def in_parts(x, t, cond):
        shallow = network.shallow(x, t, cond)
        return network.finish(shallow.inputs, network.deep(shallow.inputs))

    expected = apply()(weights(), *arguments)
    np.testing.assert_allclose(in_parts(*arguments), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "length", "message"),
    [
        (6, 5, 4, "image of 5x6 does not split"),
        (34, 4, 4, "the rows need 17 positions: expected at most 16"),
        (4, 34, 4, "the columns need 17 positions: expected at most 16"),
        (4, 4, 97, "the captions need 130 positions: expected at most 98"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(height, width, length, message):
    x, t, cond = inputs(height, width, (1, length))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(apply(), weights(), x, t, cond)


def test_text_is_required():
    x, t, _ = inputs()
    with pytest.raises(UserError, match=r"expected Conditioning\.tokens"):
        jax.eval_shape(apply(), weights(), x, t, Conditioning())


@pytest.mark.parametrize(
    "changes", [{"rope_axes": (4, 6)}, {"rope_axes": (4, 5, 7)}, {"rope_lengths": (9, 9)}]
)
def test_axes_that_are_not_three_are_refused(changes):
    with pytest.raises(UserError, match="expected three"):
        dataclasses.replace(SMALL, **changes)
