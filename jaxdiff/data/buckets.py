"""Images of many shapes, in batches of one shape each.

Podell et al. 2023, section 2.3: shapes of about one area share the images out by aspect ratio, so
that little is cut off. Every image belongs to one shape, that is known before the first batch; so
all batches of an epoch are, and every host makes its rows of the same ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxdiff.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Shapes whose sides are multiples of `step`, the longer at most `max_ratio` times the shorter.

    There are as many pixels in each as fit into those of the square, so none takes more memory.
    """

    step: int = 64
    max_ratio: float = 2.0

    def check(self, size: int) -> None:
        """Raises `UserError` for shapes that there cannot be."""
        if self.step < 1 or size % self.step:
            raise UserError(
                f"data.transforms.buckets.step is {self.step}: expected a divisor of "
                f"data.transforms.size, {size}."
            )
        if self.max_ratio < 1:
            raise UserError(
                f"data.transforms.buckets.max_ratio is {self.max_ratio}: expected 1 or more."
            )

    def shapes(self, size: int) -> list[tuple[int, int]]:
        """Heights and widths, the square first."""
        shapes = [(size, size)]
        for short in range(size - self.step, 0, -self.step):
            long = size * size // short // self.step * self.step
            if long <= self.max_ratio * short:
                shapes += [(short, long), (long, short)]
        return shapes


def nearest(
    sizes: Int[np.ndarray, "n 2"], shapes: Sequence[tuple[int, int]]
) -> Int[np.ndarray, " n"]:
    """Which of the shapes (height, width) each image's width and height come nearest to."""
    ratios = np.log(sizes[:, 1]) - np.log(sizes[:, 0])
    wanted = np.log([height / width for height, width in shapes])
    return np.abs(ratios[:, None] - wanted).argmin(1)


class Rows(NamedTuple):
    """The records of one batch."""

    shape: tuple[int, int]
    epoch: int
    records: Int[np.ndarray, " b"]


class Plan:
    """Which records make up which batch, epoch for epoch.

    In an epoch every record comes once, in an order of its own; a shape's last batch is filled up
    with those that came first. Shapes of less than one full batch give their images to the nearest
    of the others.

    Args:
      sizes: width and height of every image.
      shapes: height and width of the buckets, the square first.
      batch_size: records of a batch on all hosts together; no more than there are.
      seed: of the order.
      shuffle: whether there is one.
      fixed: whether images stay in their shape, be there less than a batch of it.
    """

    def __init__(
        self,
        sizes: Int[np.ndarray, "n 2"],
        shapes: Sequence[tuple[int, int]],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        fixed: bool = False,
    ):
        shapes = list(shapes)
        bucket = nearest(sizes, shapes)
        # The emptiest goes first: what it gives away may fill another.
        while len(shapes) > 1 and not fixed:
            counts = np.bincount(bucket, minlength=len(shapes))
            emptiest = int(counts.argmin())
            if counts[emptiest] >= batch_size:
                break
            del shapes[emptiest]
            bucket = nearest(sizes, shapes)
        self._shapes = shapes
        self._members = [np.flatnonzero(bucket == b) for b in range(len(shapes))]
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self.batches = sum(-(-len(members) // batch_size) for members in self._members)

    def rows(self, batch: int) -> Rows:
        """Batch number `batch`, counted from the first of the first epoch."""
        epoch, number = divmod(batch, self.batches)
        bucket, records = _epoch(self, epoch)[number]
        return Rows(self._shapes[bucket], epoch, records)

    def epoch(self, epoch: int) -> list[tuple[int, Int[np.ndarray, " b"]]]:
        """All batches of an epoch: the number of the shape, and the records."""
        rng = np.random.default_rng((self._seed, epoch))
        batches = []
        for bucket, members in enumerate(self._members):
            order = rng.permutation(members) if self._shuffle else members
            filled = np.resize(order, -(-len(order) // self._batch_size) * self._batch_size)
            batches += [(bucket, rows) for rows in filled.reshape(-1, self._batch_size)]
        places = rng.permutation(len(batches)) if self._shuffle else range(len(batches))
        return [batches[place] for place in places]


@lru_cache(maxsize=2)  # while one epoch ends, the next one's first batches are made
def _epoch(plan: Plan, epoch: int) -> list[tuple[int, Int[np.ndarray, " b"]]]:
    return plan.epoch(epoch)
