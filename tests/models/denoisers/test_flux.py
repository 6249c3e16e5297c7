"""FLUX transformers: what their outputs depend on, and what they do not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.flux import FLUX1, FluxConfig
from jaxdiff.models.layers import abstract_params, bind_build, bind_params, cast
from jaxdiff.sampling.feature_cache import SplitNetwork

SMALL = {
    "heads": 2,
    "head_width": 16,
    "double_depth": 2,
    "single_depth": 2,
    "text_width": 8,
}
FIRST = dataclasses.replace(
    FLUX1, **SMALL, channels=4, pooled_width=12, rope_axes=(4, 6, 6), guidance_embedding=True
)
SECOND = FluxConfig(**SMALL, channels=8, rope_axes=(4, 4, 4, 4))
BOTH = pytest.mark.parametrize("config", [FIRST, SECOND], ids=["flux1", "flux2"])


@functools.cache
def weights(config: FluxConfig):
    """Weights away from their initial zeros, which would hide what lies behind them."""
    rng = np.random.default_rng(1)
    params = abstract_params(bind_build(dataclasses.replace(config, remat="none")))
    return jax.tree.map(lambda p: jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype), params)


@functools.cache
def apply(config: FluxConfig):
    """(params, x, t, cond) -> output, compiled once per shape."""
    return jax.jit(lambda params, *inputs: bind_params(bind_build(config), params)(*inputs))


def inputs(config, height=4, width=6, references=0):
    rng = np.random.default_rng(2)

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    cond = Conditioning(tokens=random(2, 5, 8), pooled=random(2, 12), guidance=jnp.array([2.0, 4]))
    if references:
        images = [random(2, 2, 4, config.channels) for _ in range(references)]
        tokens, positions = config.reference_tokens(images)
        cond = cond._replace(reference=tokens, reference_positions=positions)
    return random(2, height, width, config.channels), jnp.array([0.3, 0.8]), cond


@BOTH
def test_the_output_has_the_shape_of_the_input_at_any_size(config):
    for height, width in ((4, 6), (8, 2)):
        x, t, cond = inputs(config, height, width)
        for params in (weights(config), cast(weights(config), "bfloat16")):
            shape = jax.eval_shape(apply(config), params, x, t, cond)
            assert (shape.shape, shape.dtype) == (x.shape, jnp.float32)


@BOTH
def test_each_input_that_the_network_reads_counts(config):
    x, t, cond = inputs(config, references=2 if config is SECOND else 0)
    run = functools.partial(apply(config), weights(config))
    y = run(x, t, cond)
    reads = {"tokens": True, "reference": True, "reference_positions": True}
    reads |= {"pooled": config is FIRST, "guidance": config is FIRST}
    for name, value in cond._asdict().items():
        if value is None:
            continue
        changed = run(x, t, cond._replace(**{name: value + 1}))
        assert (float(jnp.abs(changed - y).max()) > 1e-3) == reads[name], name
    assert float(jnp.abs(run(x, t + 0.1, cond) - y).max()) > 1e-3


@BOTH
def test_the_order_of_words_counts_only_where_they_have_positions(config):
    x, t, cond = inputs(config)
    run = functools.partial(apply(config), weights(config))
    moved = run(x, t, cond._replace(tokens=cond.tokens[:, ::-1]))
    change = float(jnp.abs(moved - run(x, t, cond)).max())
    assert change > 1e-3 if config.text_positions else change < 1e-4


def test_reference_images_have_places_of_their_own():
    _, _, cond = inputs(SECOND, references=2)
    assert cond.reference.shape == (2, 16, 8)
    assert cond.reference_positions[1, 0].tolist() == [10, 0, 0, 0]
    assert cond.reference_positions[0, 15].tolist() == [20, 1, 3, 0]


@BOTH
def test_the_parts_of_a_split_network_make_the_whole(config):
    x, t, cond = inputs(config, references=1 if config is SECOND else 0)
    network = bind_params(bind_build(config), weights(config))
    assert isinstance(network, SplitNetwork)

    @jax.jit
    def in_parts(x, t, cond):
        shallow = network.shallow(x, t, cond)
        return network.finish(shallow.inputs, network.deep(shallow.inputs))

    expected = apply(config)(weights(config), x, t, cond)
    np.testing.assert_allclose(in_parts(x, t, cond), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialised_gradients_are_the_same(remat):
    x, t, cond = inputs(SECOND)

    def gradient(config):
        return jax.jit(jax.grad(lambda p: jnp.mean(apply(config)(p, x, t, cond) ** 2)))

    expected = gradient(SECOND)(weights(SECOND))
    found = gradient(dataclasses.replace(SECOND, remat=remat))(weights(SECOND))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_axes": (4, 4, 4, 6)}, "rope_axes are .* expected at least 4 even numbers"),
        ({"rope_axes": (3, 5, 4, 4)}, "rope_axes are"),
        ({"rope_axes": (4, 6, 6)}, "expected at least 4"),
        ({"mlp_ratio": 0.01}, "mlp_ratio is 0.01, which leaves no hidden unit of 32"),
        ({"time_width": 31}, "time_width is 31: expected an even number"),
    ],
)
def test_impossible_structures_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SECOND, **changes)


@pytest.mark.parametrize("missing", ["tokens", "pooled", "guidance"])
def test_missing_conditions_are_refused(missing):
    x, t, cond = inputs(FIRST)
    with pytest.raises(UserError, match=f"expected Conditioning.{missing}"):
        jax.eval_shape(apply(FIRST), weights(FIRST), x, t, cond._replace(**{missing: None}))


def test_sizes_that_patches_do_not_tile_are_refused():
    with pytest.raises(UserError, match="multiple of 2"):
        jax.eval_shape(apply(FIRST), weights(FIRST), *inputs(FIRST, 4, 5))
