"""Distances of sets whose distance is known in closed form."""

import numpy as np
import pytest

from jaxdiff.evaluation import distances
from jaxdiff.evaluation.distances import (
    Moments,
    frechet,
    frechet_infinity,
    gaussian_mmd,
    kernel_distance,
    moments_of,
    precision_recall,
    root_factor,
)

RNG = np.random.default_rng(0)


def covariance(width: int, rank: int) -> np.ndarray:
    x = RNG.normal(size=(width, rank))
    return x @ x.T


def test_frechet_of_commuting_covariances_is_that_of_their_deviations():
    basis, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    a, b = RNG.uniform(0, 2, (2, 6))
    means = RNG.normal(size=(2, 6))
    ours = Moments(means[0], basis * a**2 @ basis.T)
    theirs = Moments(means[1], basis * b**2 @ basis.T)
    expected = ((means[0] - means[1]) ** 2).sum() + ((a - b) ** 2).sum()
    assert frechet(ours, theirs) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [3, 40])
def test_frechet_is_zero_to_itself_and_symmetric(rank):
    ours = Moments(RNG.normal(size=40), covariance(40, rank))
    theirs = Moments(RNG.normal(size=40), covariance(40, rank))
    assert frechet(ours, ours) == pytest.approx(0, abs=1e-11)
    there, back = frechet(ours, theirs), frechet(theirs, ours)
    assert there == pytest.approx(back, rel=1e-12)


def test_frechet_of_singular_covariances_has_the_trace_of_their_overlap():
    """Of two lines at an angle, the trace of the root is the product of deviations and cosine."""
    angle, a, b = 0.7, 2.0, 3.0
    u, v = np.array([1.0, 0, 0]), np.array([np.cos(angle), np.sin(angle), 0])
    ours = Moments(np.zeros(3), a**2 * np.outer(u, u))
    theirs = Moments(np.zeros(3), b**2 * np.outer(v, v))
    expected = a**2 + b**2 - 2 * a * b * np.cos(angle)
    assert frechet(ours, theirs) == pytest.approx(expected, rel=1e-12)


def test_frechet_infinity_removes_most_of_the_bias():
    width = 24
    theirs = Moments(np.zeros(width), np.eye(width))
    features = np.random.default_rng(3).normal(size=(1000, width)).astype(np.float32)
    root = root_factor(theirs.covariance)
    biased = frechet(moments_of(features), theirs, root)
    assert biased > 0.1
    assert abs(frechet_infinity(features, theirs, root)) < 0.2 * biased


def test_kernel_distance_is_unbiased(monkeypatch):
    """Of two points each, the sums can be written down."""
    x, y = np.array([[1.0, 0], [0, 1]]), np.array([[2.0, 0], [0, 2]])
    within = (0 / 2 + 1) ** 3 + (0 / 2 + 1) ** 3
    across = np.mean([(2 / 2 + 1) ** 3, 1, 1, (2 / 2 + 1) ** 3])
    assert kernel_distance(x, y) == pytest.approx(within - 2 * across)
    monkeypatch.setattr(distances, "KERNEL_SUBSETS", 4)
    same = np.random.default_rng(1).normal(size=(2, 400, 8))
    assert abs(kernel_distance(*same)) < 0.03


def test_gaussian_mmd_is_that_of_directions():
    x, y = np.array([[3.0, 0]]), np.array([[0, 0.5]])
    assert gaussian_mmd(x, y) == pytest.approx(1000 * 2 * (1 - np.exp(-2 / 200)))
    assert gaussian_mmd(x, 7 * x) == pytest.approx(0, abs=1e-12)


def test_precision_is_of_our_images_and_recall_of_the_reference():
    grid = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0)), -1).reshape(-1, 2)
    half = grid[grid[:, 0] < 4]
    assert precision_recall(grid, grid) == (1, 1)
    precision, recall = precision_recall(half, grid)
    assert precision == 1
    assert 0.5 <= recall < 0.8
    assert precision_recall(grid, half) == (recall, precision)
    assert precision_recall(half, half + 100) == (0, 0)


def test_blocks_do_not_change_distances(monkeypatch):
    x, y = RNG.normal(size=(2, 50, 3))
    whole = gaussian_mmd(x, y), precision_recall(x, y)
    monkeypatch.setattr(distances, "_BLOCK", 7)
    assert gaussian_mmd(x, y) == pytest.approx(whole[0], rel=1e-12)
    assert precision_recall(x, y) == whole[1]
