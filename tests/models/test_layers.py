import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.models.layers import abstract_params, any_rngs, bind_init, merge, pooled_token_sum


def test_the_sum_of_words_is_that_of_the_words_under_the_mask():
    rng = np.random.default_rng(0)
    words = rng.normal(size=(2, 6, 8)).astype(np.float32)
    mask = np.arange(6) < np.array([[2], [6]])
    found = pooled_token_sum(jnp.asarray(words), jnp.asarray(mask), scale=3.0)
    expected = [3 * words[0, :2].sum(0) / 2**0.5, 3 * words[1].sum(0) / 6**0.5]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_prompts_that_differ_in_half_of_their_words_differ_by_unit_variance():
    rng = np.random.default_rng(0)
    words = rng.normal(size=(500, 12, 64)).astype(np.float32)
    words[:, :6] = words[0, :6]
    found = np.asarray(pooled_token_sum(jnp.asarray(words), jnp.ones((500, 12), bool)))
    # Of 12 words 6 differ: 2^2 * 6 / 12 = 2 is their variance.
    assert abs(found.var(axis=0).mean() - 2.0) < 0.1


def test_any_generator_draws_what_flaxs_own_does():
    """Each draw of its own number, also where JAX reads the number after the next draw."""
    ours, theirs = any_rngs(), nnx.Rngs(0)
    draws = [[jax.random.key_data(rngs.params()) for _ in range(9)] for rngs in (ours, theirs)]
    np.testing.assert_array_equal(*draws)
    read = ours.default.count[...]
    ours.params()
    assert (int(read), int(ours.default.count[...])) == (9, 10)


def test_what_equal_parts_build_is_traced_once_and_handed_out_whole():
    traced = []

    def make(width, rngs):
        traced.append(width)
        return nnx.Linear(width, 2, rngs=rngs)

    abstract_params(bind_init(make, 3)).pop("kernel")  # is the caller's own
    params = {"kernel": np.full((3, 2), 2.0), "bias": np.zeros(2)}
    found = jax.tree.map(lambda x: x.shape, abstract_params(bind_init(make, 3)))
    assert found == {"kernel": (3, 2), "bias": (2,)}
    models = [merge(bind_init(make, 3), params) for _ in range(2)]
    assert traced == [3]
    np.testing.assert_array_equal(models[0](jnp.ones((1, 3))), [[6, 6]])
    models[0].kernel = nnx.Param(jnp.zeros((3, 2)))
    np.testing.assert_array_equal(models[1](jnp.ones((1, 3))), [[6, 6]])
    assert abstract_params(bind_init(make, 4))["kernel"].shape == (4, 2)
