import jax.numpy as jnp
import numpy as np

from jaxdiff.models.layers import sum_of_words


def test_the_sum_of_words_is_that_of_the_words_under_the_mask():
    rng = np.random.default_rng(0)
    words = rng.normal(size=(2, 6, 8)).astype(np.float32)
    mask = np.arange(6) < np.array([[2], [6]])
    found = sum_of_words(jnp.asarray(words), jnp.asarray(mask), scale=3.0)
    expected = [3 * words[0, :2].sum(0) / 2**0.5, 3 * words[1].sum(0) / 6**0.5]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_prompts_that_differ_in_half_of_their_words_differ_by_unit_variance():
    rng = np.random.default_rng(0)
    words = rng.normal(size=(500, 12, 64)).astype(np.float32)
    words[:, :6] = words[0, :6]
    found = np.asarray(sum_of_words(jnp.asarray(words), jnp.ones((500, 12), bool)))
    # Of 12 words 6 differ: 2^2 * 6 / 12 = 2 is their variance.
    assert abs(found.var(axis=0).mean() - 2.0) < 0.1
