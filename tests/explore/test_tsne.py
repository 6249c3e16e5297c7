import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.explore.tsne import _affinities, neighbour_map, squared_distances


@pytest.fixture(scope="module")
def clusters() -> tuple[np.ndarray, np.ndarray]:
    """Three clusters of 20 points in ten dimensions, and which one each point belongs to."""
    rng = np.random.default_rng(0)
    which = np.arange(60) % 3
    centres = 8 * np.eye(10)[which]
    return (centres + rng.normal(size=(60, 10))).astype(np.float32), which


def test_distances_are_those_of_the_points():
    x = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    expected = np.sum((x[:, None] - x[None]) ** 2, axis=-1)
    np.testing.assert_allclose(squared_distances(jnp.asarray(x)), expected, atol=1e-5)


def test_each_point_has_as_many_neighbours_as_the_perplexity_says(clusters):
    points, _ = clusters
    # Equidistant points are alike, so that making p symmetric changes nothing.
    p = np.asarray(_affinities(1 - jnp.eye(9), 8.0)) * 9
    np.testing.assert_allclose(p + np.eye(9) / 8, 1 / 8, atol=1e-5)
    p = np.asarray(_affinities(squared_distances(jnp.asarray(points)), 10.0))
    assert p.sum() == pytest.approx(1, abs=1e-5)
    rows = p / p.sum(1, keepdims=True)
    entropy = -np.sum(rows * np.log(np.where(rows > 0, rows, 1)), axis=1)
    assert 8 < np.exp(entropy.mean()) < 13


def test_what_is_close_in_the_space_is_close_on_the_map(clusters):
    points, which = clusters
    flat = neighbour_map(points)
    assert flat.shape == (60, 2)
    nearest = np.argsort(np.asarray(squared_distances(jnp.asarray(flat))), axis=1)[:, 1:6]
    assert np.mean(which[nearest] == which[:, None]) > 0.95


def test_the_map_is_the_same_at_every_call(clusters):
    points, _ = clusters
    np.testing.assert_array_equal(neighbour_map(points), neighbour_map(points))
