"""Aspect-ratio buckets: batches of one image shape each (Podell et al. 2023, section 2.3).

Shapes have about the same area, and each image is cropped to the one of the nearest aspect ratio.
Assignment and batches depend only on image sizes and the seed: every host computes the same plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Range
from jaxdiff.errors import UserError


@checked
@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Shapes with sides that are multiples of `step` and an aspect ratio of at most `max_ratio`.

    No shape has more pixels than the square one, so none takes more memory.
    """

    step: Count = 64
    max_ratio: Annotated[float, Range(1)] = 2.0

    def check(self, size: int) -> None:
        """Raise `UserError` unless `step` divides `size`."""
        if size % self.step:
            raise UserError(
                f"data.transforms.buckets.step is {self.step}: expected a divisor of "
                f"data.transforms.size, {size}."
            )

    def shapes(self, size: int) -> list[tuple[int, int]]:
        """(height, width) of each bucket, the square first."""
        shapes = [(size, size)]
        for short in range(size - self.step, 0, -self.step):
            long = size * size // short // self.step * self.step
            if long <= self.max_ratio * short:
                shapes += [(short, long), (long, short)]
        return shapes


def nearest_shape(
    sizes: Int[np.ndarray, "n 2"], shapes: Sequence[tuple[int, int]]
) -> Int[np.ndarray, " n"]:
    """Return the index of the (height, width) shape nearest in log aspect ratio, per image size."""
    ratios = np.log(sizes[:, 1]) - np.log(sizes[:, 0])
    wanted = np.log([height / width for height, width in shapes])
    return np.abs(ratios[:, None] - wanted).argmin(1)


class BucketBatch(NamedTuple):
    """The shape and the records of one batch."""

    shape: tuple[int, int]
    epoch: int
    records: Int[np.ndarray, " b"]


class BucketPlan:
    """The records of every batch of every epoch.

    Each epoch contains every record once, in its own order; a shape's last batch is completed with
    that shape's first records of the epoch. Shapes with fewer images than a batch are dropped, and
    their images go to the nearest remaining shape.

    Args:
      sizes: width and height of every image.
      shapes: height and width of the buckets, the square first.
      batch_size: records per batch on all hosts together, at most the number of records.
      seed: seed of the order.
      shuffle: whether to shuffle records and batches.
      fixed: keep every shape, however few images it has.
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
        bucket = nearest_shape(sizes, shapes)
        # One at a time, the smallest first: its images may fill another bucket.
        while len(shapes) > 1 and not fixed:
            counts = np.bincount(bucket, minlength=len(shapes))
            smallest = int(counts.argmin())
            if counts[smallest] >= batch_size:
                break
            del shapes[smallest]
            bucket = nearest_shape(sizes, shapes)
        self._shapes = shapes
        self._members = [np.flatnonzero(bucket == b) for b in range(len(shapes))]
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self.batches = sum(-(-len(members) // batch_size) for members in self._members)

    def batch(self, number: int) -> BucketBatch:
        """Return batch `number`, counted from the start of epoch 0."""
        epoch, place = divmod(number, self.batches)
        bucket, records = _epoch(self, epoch)[place]
        return BucketBatch(self._shapes[bucket], epoch, records)

    def epoch(self, epoch: int) -> list[tuple[int, Int[np.ndarray, " b"]]]:
        """Return all batches of an epoch: the index of the shape, and the records."""
        rng = np.random.default_rng((self._seed, epoch))
        batches = []
        for bucket, members in enumerate(self._members):
            order = rng.permutation(members) if self._shuffle else members
            filled = np.resize(order, -(-len(order) // self._batch_size) * self._batch_size)
            batches += [(bucket, rows) for rows in filled.reshape(-1, self._batch_size)]
        places = rng.permutation(len(batches)) if self._shuffle else range(len(batches))
        return [batches[place] for place in places]


@lru_cache(maxsize=2)  # prefetching crosses from one epoch into the next
def _epoch(plan: BucketPlan, epoch: int) -> list[tuple[int, Int[np.ndarray, " b"]]]:
    return plan.epoch(epoch)
