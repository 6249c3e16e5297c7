"""Axes of a map: coordinates of all images along one direction of a space, and what its ends mean.

A hand-made axis begins with a question about an image, answered by a number: how much nearer is it
to one text than to another, or what was drawn. Each space is then asked what it knows of that
(`read_out`). A learned axis begins with the space: where it varies most (`principal`), or what is
close to what in it (`jaxdiff.explore.tsne`).
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
    """Where every image lies along one direction.

    Attributes:
      key: what the command line calls it.
      name: what a reader is told it is.
      low: what lies at its lower end.
      high: what lies at its upper end.
      values: one for each image.
      group: how it came about.
    """

    key: str
    name: str
    low: str
    high: str
    values: Values
    group: Literal["by hand", "learned"]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a drawn scene is known to show: a figure of its first item, and words for both ends."""

    low: str
    high: str
    of: Callable[[Scene], float]


TRUTHS = {
    "size": Truth(low="small", high="large", of=lambda scene: EXTENT[scene.items[0].size]),
    "hue": Truth(low="red", high="purple", of=lambda scene: HUE[scene.items[0].colour]),
    "stem": Truth(low="no stem", high="a stem", of=lambda scene: float(scene.items[0].stem)),
}


def text_scores(images: Vectors, low: Float[np.ndarray, " d"], high: Float[np.ndarray, " d"]):
    """How much nearer each image is to one text than to the other, in cosines, float [n].

    All are unit vectors of CLIP's joint space: the score is the coordinate along `high - low`.
    """
    return images @ (high - low)


def read_out(vectors: Vectors, target: Values) -> tuple[Values, float]:
    """What the best direction of a space tells of a figure, and the share of it that it tells.

    Ridge regression, each image read by a fit to the others of `FOLDS` parts, so that in a space of
    more dimensions than images nothing is told that only that image itself says.

    Returns:
      The figure as read, and R^2, the share of its variance that is explained: at most 1; 0 or less
      where the space does not know it.
    """
    n = len(vectors)
    centred = vectors.astype(np.float64) - vectors.mean(0)
    gram = centred @ centred.T
    scale = np.trace(gram) / n
    fold = np.random.default_rng(0).permutation(n) % min(FOLDS, n)
    total = np.sum((target - target.mean()) ** 2)
    best = np.full(n, target.mean()), -np.inf
    for ridge in RIDGES:
        read = np.empty(n)
        for k in range(fold.max() + 1):
            test, train = fold == k, fold != k
            read[test] = _fitted(gram[:, train], train, test, target[train], ridge * scale)
        told = 1 - np.sum((read - target) ** 2) / total if total else 0.0
        if told > best[1]:
            best = read, float(told)
    return best


def _fitted(
    gram: Float[np.ndarray, "n t"],
    train: Bool[np.ndarray, " n"],
    test: Bool[np.ndarray, " n"],
    target: Float[np.ndarray, " t"],
    ridge: float,
) -> Float[np.ndarray, " e"]:
    """Ridge regression by products of points, those of `test` read by a fit to those of `train`.

    Products with the centre of `train` are taken off, so that its mean is no part of the fit.
    """
    inner = gram[train]
    centred = gram - gram.mean(1, keepdims=True) - inner.mean(0) + inner.mean()
    kernel = centred[train] + ridge * np.eye(len(target))
    return target.mean() + centred[test] @ np.linalg.solve(kernel, target - target.mean())


def principal(vectors: Vectors, count: int) -> tuple[Float[np.ndarray, "n k"], list[float]]:
    """Coordinates along the directions of the largest variance, and each one's share of it.

    The sign of a direction, which is free, is that in which its largest coordinate is positive.
    """
    centred = vectors.astype(np.float64) - vectors.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    along = u[:, :count] * s[:count]
    along *= np.where(along.max(0) >= -along.min(0), 1.0, -1.0)
    total = np.sum(s**2) or 1.0
    return along, [float(x**2 / total) for x in s[:count]]


def end_words(values: Values, captions: Sequence[str], count: int = 2) -> tuple[str, str]:
    """The words that tell the captions at one end of an axis from those at the other.

    Those of the lowest and of the highest fifth, by the difference in how many captions have them.

    Returns:
      Words for the lower and the upper end, the most telling first; "" where none tells.
    """
    order: list[int] = np.argsort(values, kind="stable").tolist()
    part = max(len(order) // 5, 1)
    counts = []
    for end in (order[:part], order[-part:]):
        words = (set(re.findall(r"\w+", captions[i].lower())) for i in end)
        counts.append(Counter(word for caption in words for word in caption))
    texts = []
    for here, there in (counts, counts[::-1]):
        excess = {word: n - there[word] for word, n in here.items() if len(word) > 2}
        telling = [w for w, n in sorted(excess.items(), key=lambda x: (-x[1], x[0])) if n > 1]
        texts.append(", ".join(telling[:count]))
    return texts[0], texts[1]


def spread(values: Values) -> Values:
    """Onto [0, 1], what lies outside all but the outermost hundredths at the very ends."""
    low, high = np.percentile(values, [1, 99])
    return np.clip((values - low) / ((high - low) or 1.0), 0, 1)
