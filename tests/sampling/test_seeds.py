"""What is said of the last bit of noise is said of what users compile."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.sampling.loop import noise_from_seeds

pytestmark = pytest.mark.optimized
SHAPE = (4, 4, 3)


def test_noise_depends_on_its_seed_alone_bit_for_bit():
    noise = noise_from_seeds(jnp.array([3, 9, 3]), SHAPE)
    np.testing.assert_array_equal(noise[0], noise[2])
    np.testing.assert_array_equal(noise_from_seeds(jnp.array([9]), SHAPE)[0], noise[1])
    assert not np.allclose(noise[0], noise[1])
