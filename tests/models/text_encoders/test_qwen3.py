"""Qwen3: what a token sees, where padding may be, and which blocks are built."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.models.layers import abstract_params, bind_build, bind_params
from jaxdiff.models.text_encoders.qwen3 import Qwen3Config, Qwen3TextEncoder

N = 8
SIZE = {"width": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 24}
CONFIG = Qwen3Config(vocab_size=40, depth=3, **SIZE)
ENCODER = Qwen3TextEncoder(model=CONFIG, hidden_layers=(1, 3), max_length=N)
IDS = np.random.default_rng(0).integers(0, 40, (2, N))


@functools.cache
def params():
    rng = np.random.default_rng(1)
    shapes = abstract_params(bind_build(ENCODER))
    return jax.tree.map(lambda x: rng.normal(0.3, 0.5, x.shape).astype(np.float32), shapes)


@jax.jit
def run(ids, mask):
    return bind_params(bind_build(ENCODER), params())(ids, mask)


def test_a_token_sees_itself_and_what_precedes_it_alone():
    full = np.ones(IDS.shape, bool)
    before, after = run(IDS, full), run(np.where(np.arange(N) >= 5, IDS + 1, IDS) % 40, full)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, :5], y[:, :5])
        assert (np.abs(x - y)[:, 5:].max(axis=2) > 1e-3).all()


def test_padding_on_either_side_gives_the_same_tokens():
    """Rotary embeddings depend on distances alone."""
    right = run(IDS, np.arange(N) < np.array([[5], [8]]))
    rolled = np.stack([np.roll(IDS[0], 3), IDS[1]])
    left = run(rolled, np.arange(N) >= np.array([[3], [0]]))
    for x, y in zip(right, left, strict=True):
        np.testing.assert_allclose(x[0, :5], y[0, 3:], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(x[1], y[1], rtol=1e-5, atol=1e-6)
        assert np.isfinite(y).all()


def test_the_id_of_padding_does_not_matter():
    mask = np.arange(N) < np.array([[5], [8]])
    for x, y in zip(run(IDS, mask), run(np.where(mask, IDS, 0), mask), strict=True):
        np.testing.assert_array_equal(x[mask], y[mask])


def test_blocks_above_the_last_hidden_state_are_not_built():
    middle = Qwen3TextEncoder(model=CONFIG, hidden_layers=(0, 2), max_length=N)
    shapes = abstract_params(bind_build(middle))
    assert "final_norm" not in shapes
    assert {x.shape[0] for x in jax.tree.leaves(shapes["blocks"])} == {2}
    assert "final_norm" in params()
    assert middle.joined_width == 2 * CONFIG.width
    assert middle.flops() == ENCODER.flops() * 2 / 3


def test_an_id_beyond_the_vocabulary_is_nan():
    ids = np.where(np.arange(N) == 2, 40, IDS)
    assert np.isnan(run(ids, np.ones(IDS.shape, bool))[0][:, 2]).all()


def test_bfloat16_weights_give_bfloat16():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params())
    network = bind_params(bind_build(ENCODER), half)
    states = jax.eval_shape(network, jnp.asarray(IDS), jnp.ones(IDS.shape, bool))
    assert [x.dtype for x in states] == [jnp.bfloat16, jnp.bfloat16]


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 1), (4,), (0,)])
def test_hidden_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(UserError, match=r"hidden_layers are .*expected ascending numbers"):
        Qwen3TextEncoder(model=CONFIG, hidden_layers=layers)


@pytest.mark.parametrize("wrong", [{"kv_heads": 3}, {"head_dim": 7}])
def test_sizes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(UserError, match="expected heads that are a multiple of kv_heads"):
        Qwen3Config(**{**SIZE, **wrong})
