"""T5's encoder: positions count by distance, and padding is read unless it is masked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.models.layers import abstract_params, bind_build, bind_params
from jaxdiff.models.text_encoders.t5 import T5Config, T5TextEncoder, position_buckets

N = 8
SIZE = {"width": 16, "depth": 2, "heads": 2, "head_dim": 8, "mlp_width": 24, "vocab_size": 40}
ENCODER = T5TextEncoder(model=T5Config(**SIZE, buckets=8, max_distance=6), max_length=N)
IDS = np.random.default_rng(0).integers(0, 40, (2, N))


@functools.cache
def params():
    rng = np.random.default_rng(1)
    shapes = abstract_params(bind_build(ENCODER))
    return jax.tree.map(lambda x: rng.normal(0.3, 0.5, x.shape).astype(np.float32), shapes)


@jax.jit
def run(ids, mask=None):
    return bind_params(bind_build(ENCODER), params())(ids, mask)


def test_padding_on_either_side_gives_the_same_tokens():
    right = run(IDS, np.arange(N) < np.array([[5], [8]]))
    rolled = np.stack([np.roll(IDS[0], 3), IDS[1]])
    left = run(rolled, np.arange(N) >= np.array([[3], [0]]))
    np.testing.assert_allclose(right[0, :5], left[0, 3:], atol=1e-5)
    np.testing.assert_allclose(right[1], left[1], atol=1e-6)


def test_without_a_mask_every_token_changes_every_other():
    away = np.abs(run(IDS) - run(np.where(np.arange(N) == 6, IDS + 1, IDS) % 40))
    assert (away.max(axis=2) > 1e-3).all()


def test_near_positions_have_buckets_of_their_own_and_far_ones_share_them():
    buckets = position_buckets(300, 32, 128)
    assert list(buckets[100, 100:92:-1]) == list(range(8))
    assert list(buckets[100, 101:108]) == list(range(17, 24))
    assert set(buckets[299, :170]) == {15}
    assert set(np.diff(buckets[299, ::-1])) == {0, 1}


def test_bfloat16_weights_give_bfloat16():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params())
    tokens = jax.eval_shape(bind_params(bind_build(ENCODER), half), jnp.asarray(IDS))
    assert (tokens.dtype, tokens.shape) == (jnp.bfloat16, (2, N, 16))


@pytest.mark.parametrize("wrong", [{"buckets": 6}, {"buckets": 32, "max_distance": 8}])
def test_buckets_that_do_not_fit_are_refused(wrong):
    with pytest.raises(UserError, match="expected a multiple of 4, and a max_distance above"):
        T5Config(**SIZE, **wrong)
