import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.explore.page import nearest_neighbours
from jaxdiff.explore.tsne import tsne


@pytest.fixture(scope="module")
def clusters() -> tuple[np.ndarray, np.ndarray]:
    """Three clusters of 20 points in ten dimensions, and the cluster of each point."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    centres = 8 * np.eye(10)[labels]
    return (centres + rng.normal(size=(60, 10))).astype(np.float32), labels


def test_neighbours_in_the_space_are_neighbours_in_the_embedding(clusters):
    points, labels = clusters
    embedding = tsne(points)
    assert embedding.shape == (60, 2)
    np.testing.assert_allclose(embedding.mean(0), 0, atol=1e-4)
    assert np.mean(labels[nearest_neighbours(embedding, 5)] == labels[:, None]) > 0.95


def test_the_same_points_give_the_same_bits(clusters):
    points, _ = clusters
    np.testing.assert_array_equal(tsne(points), tsne(points))


def test_ten_points_are_enough(clusters):
    points, _ = clusters
    assert np.isfinite(tsne(points[:10])).all()


def test_equal_points_get_equal_coordinates():
    np.testing.assert_array_equal(tsne(np.ones((12, 3), np.float32)), 0)
    repeated = np.repeat(np.eye(3, dtype=np.float32), 8, axis=0)
    assert np.isfinite(tsne(repeated)).all()


def test_a_missing_scikit_learn_names_the_extra(clusters, monkeypatch):
    monkeypatch.setattr("jaxdiff.explore.tsne.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[explore\]'"):
        tsne(clusters[0])
