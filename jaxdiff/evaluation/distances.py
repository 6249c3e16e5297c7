"""Distances of two sets of feature vectors, in float64.

Frechet   |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2      (Dowson & Landau 1982)   (1)
kernel    unbiased MMD^2 of the kernel (x.y / d + 1)^3        (Binkowski et al. 2018)  (2)
mmd       1000 times the biased MMD^2 of a Gaussian kernel,
          sigma = 10, of unit vectors                         (Jayasumana et al. 2024) (3)
precision fraction of images within the k-nearest-neighbour
          balls of the reference, and recall the converse     (Kynkaanniemi et al. 2019)
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epy
from jaxtyping import Float

with epy.lazy_imports():  # not for a recipe that is only read
    import scipy.linalg

Vectors = Float[np.ndarray, "_ d"]
Matrix = Float[np.ndarray, "d d"]

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE, KERNEL_SEED = 100, 1000, 2020  # those of torch-fidelity
MMD_SIGMA, MMD_SCALE = 10.0, 1000.0
NEIGHBOURS = 3
NEIGHBOUR_SAMPLES = 10_000  # of each set; distances of all pairs are compared
INFINITY_SIZES = 8

_BLOCK = 2048  # rows of a block of a matrix of all pairs


class Moments(NamedTuple):
    """Mean and covariance of a set of features."""

    mean: Float[np.ndarray, " d"]
    covariance: Matrix


def root_factor(covariance: Matrix) -> Matrix:
    """Return A with A A^T = S, for a symmetric S without negative eigenvalues but for rounding."""
    values, vectors = scipy.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def frechet(ours: Moments, theirs: Moments, root: Matrix | None = None) -> float:
    """Return eq. 1.

    With S1 = A A^T and S2 = B B^T the last trace is the sum of the singular values of A^T B, which
    exists for singular covariances too, is real, and is not the root of a rounded square.

    Args:
      ours: of one set.
      theirs: of the other.
      root: `root_factor(theirs.covariance)`, where it is known.
    """
    root = root_factor(theirs.covariance) if root is None else root
    cross = np.sum(scipy.linalg.svdvals(root_factor(ours.covariance).T @ root))
    shift = ours.mean - theirs.mean
    traces = np.trace(ours.covariance) + np.trace(theirs.covariance)
    return float(shift @ shift + traces - 2 * cross)


def moments_of(features: Vectors) -> Moments:
    """Return the mean and the unbiased covariance."""
    x = features.astype(np.float64)
    mean = x.mean(axis=0)
    x -= mean
    return Moments(mean, x.T @ x / (len(x) - 1))


def frechet_infinity(features: Vectors, theirs: Moments, root: Matrix) -> float:
    """Return eq. 1 extrapolated to infinitely many samples.

    Its bias is about proportional to 1 / n (Chong & Forsyth 2020, eq. 5): a line through the
    distances of random subsets, of n / 2 to n samples, is extended to 1 / n = 0.
    """
    rng, count = np.random.default_rng(0), len(features)
    sizes = np.linspace(count / 2, count, INFINITY_SIZES).astype(int)
    distances = []
    for size in sizes:
        chosen = np.sort(rng.choice(count, size, replace=False))
        distances.append(frechet(moments_of(features[chosen]), theirs, root))
    return float(np.polyfit(1 / sizes, distances, 1)[1])


def kernel_distance(ours: Vectors, theirs: Vectors) -> float:
    """Return the mean of eq. 2 over random subsets, which are those of torch-fidelity."""
    rng = np.random.RandomState(KERNEL_SEED)
    size = min(KERNEL_SUBSET_SIZE, len(ours), len(theirs))
    found = []
    for _ in range(KERNEL_SUBSETS):
        x = ours[rng.choice(len(ours), size, replace=False)].astype(np.float64)
        y = theirs[rng.choice(len(theirs), size, replace=False)].astype(np.float64)
        within = (_off_diagonal_sum(x) + _off_diagonal_sum(y)) / (size * (size - 1))
        found.append(within - 2 * _cubic(x, y).mean())
    return float(np.mean(found))


def _cubic(x: Vectors, y: Vectors) -> Float[np.ndarray, "n m"]:
    kernel = x @ y.T / x.shape[1] + 1
    return kernel * kernel * kernel  # NumPy's power is many times as slow


def _off_diagonal_sum(x: Vectors) -> float:
    kernel = _cubic(x, x)
    return kernel.sum() - np.trace(kernel)


def gaussian_mmd(ours: Vectors, theirs: Vectors) -> float:
    """Return eq. 3; features are divided by their lengths."""
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in map(_double, (ours, theirs)))

    def mean(a: Vectors, b: Vectors) -> float:
        sums = [np.exp(-d / (2 * MMD_SIGMA**2)).sum() for d in _square_distances(a, b)]
        return sum(sums) / (len(a) * len(b))

    return MMD_SCALE * float(mean(x, x) + mean(y, y) - 2 * mean(x, y))


def precision_recall(ours: Vectors, theirs: Vectors) -> tuple[float, float]:
    """Return precision and recall of our images, `theirs` being the reference."""
    ours, theirs = (_double(spread(x, NEIGHBOUR_SAMPLES)) for x in (ours, theirs))
    radii = _radii(theirs)
    precision = [(d <= radii).any(axis=1) for d in _square_distances(ours, theirs)]
    radii = _radii(ours)
    recall = [(d <= radii).any(axis=1) for d in _square_distances(theirs, ours)]
    return float(np.concatenate(precision).mean()), float(np.concatenate(recall).mean())


def _radii(x: Vectors) -> Float[np.ndarray, " n"]:
    """Return the square distance of each vector to its k-th nearest neighbour."""
    k = min(NEIGHBOURS, len(x) - 1)
    return np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _square_distances(x, x)])


def _square_distances(x: Vectors, y: Vectors) -> Iterator[Float[np.ndarray, "k m"]]:
    """Yield the square distances of all pairs, some rows at a time."""
    norms = (y**2).sum(axis=1)
    for start in range(0, len(x), _BLOCK):
        rows = x[start : start + _BLOCK]
        yield np.maximum((rows**2).sum(axis=1)[:, None] + norms - 2 * rows @ y.T, 0)


def _double(x: Vectors) -> Vectors:
    return x.astype(np.float64)


def spread(x: Vectors, count: int) -> Vectors:
    """Return at most `count` rows, evenly spread."""
    return x if len(x) <= count else x[np.arange(count) * len(x) // count]
