"""Aspect-ratio buckets: batches of one image shape each (Podell et al. 2023, section 2.3).

Shapes have about the same area, and each image is cropped to the one of the nearest aspect ratio.
Reference images are too: a batch has one shape of each, and one number of them.
Assignment and batches depend only on image sizes and the seed: every host computes the same plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Float, Int

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
    ratios, wanted = _log_ratios(sizes, shapes)
    return np.abs(ratios[:, None] - wanted).argmin(1)


def _log_ratios(
    sizes: Int[np.ndarray, "*n 2"], shapes: Sequence[tuple[int, int]]
) -> tuple[Float[np.ndarray, "*n"], Float[np.ndarray, " s"]]:
    """Return log(height / width) of images and of shapes."""
    ratios = np.log(sizes[..., 1]) - np.log(sizes[..., 0])
    return ratios, np.log([height / width for height, width in shapes])


class BucketBatch(NamedTuple):
    """The records of one batch, and the shapes of their image and of each reference."""

    shapes: tuple[tuple[int, int], ...]
    epoch: int
    records: Int[np.ndarray, " b"]


class BucketPlan:
    """The records of every batch of every epoch.

    Each epoch contains every record once, in its own order; a shape's last batch is completed with
    that shape's first records of the epoch. Shapes with fewer images than a batch are dropped, and
    their images go to the nearest remaining shape. With references, "shape" stands for those of
    the image and of each reference; records with equally many share them.

    Args:
      sizes: width and height of every image and its references; 0 where it has fewer.
      shapes: height and width of the buckets, the square first.
      batch_size: records per batch on all hosts together, at most the number of records.
      seed: seed of the order.
      shuffle: whether to shuffle records and batches.
      fixed: keep every shape, however few images it has.
    """

    def __init__(
        self,
        sizes: Int[np.ndarray, "n images 2"],
        shapes: Sequence[tuple[int, int]],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        fixed: bool = False,
    ):
        self._shapes: list[tuple[tuple[int, int], ...]] = []
        self._members: list[Int[np.ndarray, " m"]] = []
        images = (sizes[..., 0] > 0).sum(1)
        for count in np.unique(images):
            records = np.flatnonzero(images == count)
            chosen, bucket = _assign(sizes[records, :count], shapes, 1 if fixed else batch_size)
            self._shapes += [tuple(shapes[i] for i in places) for places in chosen.tolist()]
            self._members += [records[bucket == b] for b in range(len(chosen))]
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


def _assign(
    sizes: Int[np.ndarray, "n images 2"], shapes: Sequence[tuple[int, int]], least: int
) -> tuple[Int[np.ndarray, "buckets images"], Int[np.ndarray, " n"]]:
    """Return buckets of at least `least` records, as indices of shapes, and that of each record."""
    n, count, _ = sizes.shape
    nearest = nearest_shape(sizes.reshape(-1, 2), shapes).reshape(n, count)
    codes = np.ravel_multi_index(tuple(nearest.T), (len(shapes),) * count)
    codes, bucket = np.unique(codes, return_inverse=True)
    chosen = np.stack(np.unravel_index(codes, (len(shapes),) * count), axis=1)
    ratios, wanted = _log_ratios(sizes, shapes)
    wanted = wanted[chosen]
    left = np.ones(len(chosen), bool)
    # One at a time, the smallest first: its images may fill another bucket.
    while left.sum() > 1:
        numbers = np.where(left, np.bincount(bucket, minlength=len(chosen)), n + 1)
        smallest = int(numbers.argmin())
        if numbers[smallest] >= least:
            break
        left[smallest] = False
        moved = np.flatnonzero(bucket == smallest)
        distance = np.abs(ratios[moved, None] - wanted[left]).sum(-1)
        bucket[moved] = np.flatnonzero(left)[distance.argmin(1)]
    return chosen[left], (np.cumsum(left) - 1)[bucket]


@lru_cache(maxsize=2)  # prefetching crosses from one epoch into the next
def _epoch(plan: BucketPlan, epoch: int) -> list[tuple[int, Int[np.ndarray, " b"]]]:
    return plan.epoch(epoch)
