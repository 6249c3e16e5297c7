"""Comparison of parameters that a file must return unchanged."""

import jax
import numpy as np


def assert_same_bits(found, expected):
    """Check that two trees of arrays have the same structure, types, shapes and bits."""

    def check(path, x, y):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path

    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree_util.tree_map_with_path(check, found, expected)
