"""Axes of an embedding map: a coordinate for each image, with labels for both ends.

A *chosen* axis is a number known for each image, such as its similarity to one text rather than
another, or an attribute of its scene. `linear_probe` reads that number from a space and measures
how much of it the space represents. A *learned* axis comes from the space alone: its principal
components, or t-SNE (`jaxdiff.explore.tsne`).
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from jaxdiff.datasets.produce.rendering import EXTENT, HUE
from jaxdiff.datasets.produce.scene import Scene

FOLDS = 5
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean eigenvalue

Vectors = Float[np.ndarray, "n d"]
Values = Float[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The coordinate of every image along one direction.

    Attributes:
      key: its name on the command line.
      name: its name on the map.
      low: label of its lower end.
      high: label of its upper end.
      values: one for each image.
      group: where it comes from.
    """

    key: str
    name: str
    low: str
    high: str
    values: Values
    group: Literal["chosen", "learned"]


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """A number of a synthetic scene's first item, with labels for both ends."""

    low: str
    high: str
    of: Callable[[Scene], float]


ATTRIBUTES = {
    "size": Attribute(low="small", high="large", of=lambda scene: EXTENT[scene.items[0].size]),
    "hue": Attribute(low="red", high="purple", of=lambda scene: HUE[scene.items[0].colour]),
    "stem": Attribute(low="no stem", high="a stem", of=lambda scene: float(scene.items[0].stem)),
}


def text_scores(images: Vectors, low: Float[np.ndarray, " d"], high: Float[np.ndarray, " d"]):
    """Return the cosine similarity of each image to `high` minus that to `low`, float [n].

    All are unit vectors of CLIP's joint space: the score is the coordinate along `high - low`.
    """
    return images @ (high - low)


def linear_probe(vectors: Vectors, target: Values) -> tuple[Values, float]:
    """Predict a number from a space by ridge regression, cross-validated.

    Each of `FOLDS` folds is predicted by a fit to the others, so that a space with more dimensions
    than images does not fit noise. The best of `RIDGES` counts.

    Returns:
      The predictions, and R^2, the fraction of the variance that they explain: at most 1; 0 or less
      where the space does not represent the number.
    """
    n = len(vectors)
    centred = vectors.astype(np.float64) - vectors.mean(0)
    gram = centred @ centred.T
    scale = np.trace(gram) / n
    fold = np.random.default_rng(0).permutation(n) % min(FOLDS, n)
    total = np.sum((target - target.mean()) ** 2)
    best = np.full(n, target.mean()), -np.inf
    for ridge in RIDGES:
        predicted = np.empty(n)
        for k in range(fold.max() + 1):
            test, train = fold == k, fold != k
            predicted[test] = _ridge(gram[:, train], train, test, target[train], ridge * scale)
        r_squared = 1 - np.sum((predicted - target) ** 2) / total if total else 0.0
        if r_squared > best[1]:
            best = predicted, float(r_squared)
    return best


def _ridge(
    gram: Float[np.ndarray, "n t"],
    train: Bool[np.ndarray, " n"],
    test: Bool[np.ndarray, " n"],
    target: Float[np.ndarray, " t"],
    ridge: float,
) -> Float[np.ndarray, " e"]:
    """Kernel ridge regression: fit to the points `train`, predict the points `test`.

    The kernel is centred on the mean of `train`, which is therefore not regularised.
    """
    inner = gram[train]
    centred = gram - gram.mean(1, keepdims=True) - inner.mean(0) + inner.mean()
    kernel = centred[train] + ridge * np.eye(len(target))
    return target.mean() + centred[test] @ np.linalg.solve(kernel, target - target.mean())


def principal_components(
    vectors: Vectors, count: int
) -> tuple[Float[np.ndarray, "n k"], list[float]]:
    """Return coordinates along the principal directions, and each one's fraction of the variance.

    Signs are chosen so that the coordinate of largest magnitude is positive.
    """
    centred = vectors.astype(np.float64) - vectors.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    along = u[:, :count] * s[:count]
    along *= np.where(along.max(0) >= -along.min(0), 1.0, -1.0)
    total = np.sum(s**2) or 1.0
    return along, [float(x**2 / total) for x in s[:count]]


def distinctive_words(values: Values, captions: Sequence[str]) -> tuple[str, str]:
    """Return the words that distinguish the captions at one end of an axis from the other end.

    Compares the lowest with the highest fifth by the number of captions that contain each word.

    Returns:
      At most two words for the lower and the upper end, the most distinctive first; "" for none.
    """
    order: list[int] = np.argsort(values, kind="stable").tolist()
    fifth = max(len(order) // 5, 1)
    counts = []
    for end in (order[:fifth], order[-fifth:]):
        words = (set(re.findall(r"\w+", captions[i].lower())) for i in end)
        counts.append(Counter(word for caption in words for word in caption))
    texts = []
    for here, there in (counts, counts[::-1]):
        excess = {word: n - there[word] for word, n in here.items() if len(word) > 2}
        ranked = sorted(excess.items(), key=lambda x: (-x[1], x[0]))
        texts.append(", ".join([word for word, n in ranked if n > 1][:2]))
    return texts[0], texts[1]


def rescale(values: Values) -> Values:
    """Scale to [0, 1] by the 1st and 99th percentiles, and clip."""
    low, high = np.percentile(values, [1, 99])
    return np.clip((values - low) / ((high - low) or 1.0), 0, 1)
