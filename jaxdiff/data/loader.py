"""The input pipeline: shuffle records, split them over hosts, and batch them on the devices.

A batch depends on its number alone, for any number of hosts, devices and processes: each reads the
rows of its own devices. The step of a run determines its position in the data, so that a run can
resume on other machines.
"""

import bisect
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast

import jax
import numpy as np
from absl import flags
from etils import epy
from jaxtyping import Int, Int32

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import BelowOne, Count, Fraction, Natural
from jaxdiff.data.bad_records import RecordError, too_many
from jaxdiff.data.buckets import BucketPlan
from jaxdiff.data.held_out import Indices, read_all, split_records
from jaxdiff.data.sources.cached_latents import CachedLatents, LatentOptions
from jaxdiff.data.sources.prior_preservation import AnySource, PriorPreservation
from jaxdiff.data.transforms import Transforms, stored_sizes
from jaxdiff.data.workers import end_with_parent, ignore_signals
from jaxdiff.errors import UserError

with epy.lazy_imports():  # with Orbax; not for a recipe that is only read
    import grain

# Grain's error for a process that is killed or crashes.
WORKER_DIED = r"Worker process was terminated unexpectedly with exit code (-?\d+)"
# Keys of a batch that go to the devices; the others stay on the host.
ON_DEVICE = ("image", "latents", "references", "text", "text_features", "size_crop")

Tokenize = Callable[[list[str]], Any]
"""A picklable function from captions to a tree of arrays [b, ...]."""


@checked
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data and the input pipeline.

    Attributes:
      source: source of the records.
      transforms: transforms of images and captions.
      workers: processes per host that read batches; 0 reads in the main process.
      threads: batches read concurrently in every process: one is fastest for small images, which
        are bound by Python's lock, several for photographs and remote storage.
      prefetch: batches that each worker reads ahead, and batches that wait on the devices.
      shuffle: whether to shuffle each epoch.
      max_bad_fraction: fraction of unreadable records beyond which the run stops.
      held_out: share of the records that is not trained on, which the evaluator `HeldOutLoss` uses;
        chosen by a hash of each (`split_records`).
      cache: with `cache.views` a run first encodes all records into its folder, as
        `jaxdiff prepare --latents.views` does.
    """

    source: AnySource | PriorPreservation | CachedLatents
    transforms: Transforms
    workers: Natural = 0
    threads: Count = 1
    prefetch: Count = 2
    shuffle: bool = True
    max_bad_fraction: Fraction = 0.01
    held_out: BelowOne = 0.0
    cache: LatentOptions = field(default_factory=LatentOptions)

    @property
    def gives_latents(self) -> bool:
        """Whether batches hold latents instead of images."""
        return self.cache.views > 0 or isinstance(self.source, CachedLatents)

    @property
    def gives_text(self) -> bool:
        """Whether batches hold the captions' encoded features."""
        if isinstance(self.source, CachedLatents):
            return self.source.has_text
        return self.cache.text


class _Example(TypedDict):
    """One usable record, and the error of the unusable one that it replaces, if any."""

    x: np.ndarray  # uint8 [h, w, 3] or moments of latents, [h, w, 2 c]
    caption: str
    text: np.ndarray | None  # cached features of the caption
    size_crop: Int32[np.ndarray, " 6"]
    references: Sequence[np.ndarray]  # of the type of x, each of its own height and width
    bad: list[str]


@dataclass(frozen=True)
class _Read:
    """Reads and transforms one record; the error of a bad one is returned, not raised."""

    data: DataConfig

    def __call__(
        self,
        index: int,
        rng: np.random.Generator,
        shapes: Sequence[tuple[int, int]] | None = None,
    ) -> _Example | RecordError:
        source, transforms, text = self.data.source, self.data.transforms, None
        try:
            if isinstance(source, CachedLatents):
                record = source[index]
                x, caption, size_crop, references = transforms.of_latents(record, rng)
                text = source.text(record, caption)
            else:
                x, caption, size_crop, references = transforms(source[index], rng, shapes)
        except RecordError as error:
            return error
        return {
            "x": x,
            "caption": caption,
            "text": text,
            "size_crop": size_crop,
            "references": references,
            "bad": [],
        }


@dataclass(frozen=True)
class _Collate:
    """Stacks records and tokenizes their captions, a batch at a time."""

    tokenize: Tokenize | None
    name: str  # "image" or "latents"

    def __call__(self, records: Sequence[_Example]) -> dict[str, Any]:
        bad = [name for record in records for name in record["bad"]]
        text = self.tokenize and self.tokenize([record["caption"] for record in records])
        features = [record["text"] for record in records if record["text"] is not None]
        references = zip(*(record["references"] for record in records), strict=True)
        stacked = tuple(np.stack(images) for images in references)
        return {
            **({} if text is None else {"text": text}),
            **({"text_features": np.stack(features)} if features else {}),
            **({"references": stacked} if stacked else {}),
            self.name: np.stack([record["x"] for record in records]),
            "size_crop": np.stack([record["size_crop"] for record in records]),
            "skipped": len(bad),
            "bad": bad,
        }


def make_dataset(
    data: DataConfig,
    tokenize: Tokenize | None,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    first: int = 0,
) -> "grain.IterDataset":
    """Make an endless data set of batches, or of this host's rows of them.

    A batch holds `image` uint8 [b, h, w, 3], `text` as `tokenize` returns it, `size_crop` int32
    [b, 6], the number of unusable records, `skipped`, and their errors, `bad`. Another record of
    the batch replaces an unusable one. `CachedLatents` give `latents` [b, h, w, 2 c] in place of
    `image`, in their stored type: means of z, then logarithms of its variance; and `text_features`
    [b, m], captions encoded by `Conditioner.pack`, if cached. `references`, of records that have
    some, is a tuple of arrays like `image` or `latents`, each of its own height and width.

    With `Buckets`, h and w differ between batches, some records repeat (`BucketPlan`), and the
    sizes of all images are read first; with references, their number differs too.

    Args:
      data: records, transforms and settings.
      tokenize: of the captions; None leaves text out.
      batch_size: records of a batch, on all hosts together.
      seed: of the order and the transforms.
      rows: rows of each batch that this host reads (`host_rows`); all by default.
      first: number of the first batch: the steps taken before.

    Raises:
      UserError: the data are unusable, or fewer than a batch; from the iterator, if no record of a
        batch is usable.
    """
    data.source.check()
    if isinstance(data.source, CachedLatents):
        data.source.check_transforms(data.transforms)
    records = None if data.held_out == 0 else split_records(data.source, data.held_out)[0]
    count = len(data.source) if records is None else len(records)
    if batch_size > count:
        raise UserError(
            f"A batch of {batch_size} records is more than the {count} that the data hold for "
            "training: lower train.batch_size, or add data."
        )
    one_shape = data.transforms.buckets is None and not data.transforms.references
    order = _in_order if one_shape else _in_buckets
    own = tuple(range(batch_size) if rows is None else rows)
    read = _ReadRows(order(data, batch_size, seed, records), batch_size, own)
    dataset = _batches(data, read, tokenize, range(first, sys.maxsize))
    return _in_workers(dataset, data) if data.workers else dataset


def make_evaluation_dataset(
    data: DataConfig,
    tokenize: Tokenize | None,
    records: Sequence[int],
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
) -> "grain.IterDataset":
    """Make a data set of batches of some records, once and in order, as `make_dataset` does.

    Images are cropped at the center and not flipped, captions are not dropped: a batch depends on
    its records alone. The last records, fewer than a batch, are left out.
    """
    transforms = dataclasses.replace(
        data.transforms, buckets=None, crop="center", flip=False, caption_dropout=0.0
    )
    read_one = _Read(dataclasses.replace(data, transforms=transforms))
    order = _ByPlace(read_one, tuple(map(int, records)), batch_size)
    own = tuple(range(batch_size) if rows is None else rows)
    read = _ReadRows(order, batch_size, own)
    return _batches(data, read, tokenize, range(len(records) // batch_size))


def _batches(
    data: DataConfig, read: "_ReadRows", tokenize: Tokenize | None, numbers: range
) -> "grain.IterDataset":
    """Return the batches of these numbers, read in the calling process."""
    collate = _Collate(tokenize, "latents" if isinstance(data.source, CachedLatents) else "image")
    batches = grain.MapDataset.range(numbers.start, numbers.stop).map(read).map(collate)
    threads = 0 if data.threads == 1 else data.threads  # 0 reads in the calling thread
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return batches.to_iter_dataset(options)


@dataclass(frozen=True)
class _ByPlace:
    """Some records, in order; captions and views depend on the record's place alone."""

    read: _Read
    records: tuple[int, ...]
    batch_size: int

    def __call__(self, batch: int, row: int) -> _Example | RecordError:
        place = batch * self.batch_size + row
        return self.read(self.records[place], np.random.default_rng(place))


@dataclass(frozen=True)
class _Nth:
    """Some records, by their place among these."""

    records: Indices

    def __call__(self, place: int) -> int:
        return int(self.records[place])


_Order = Callable[[int, int], _Example | RecordError]
"""Returns a record by the numbers of its batch and row."""


@dataclass(frozen=True)
class _OneShape:
    """Images of one shape, in an endless sequence of shuffled epochs."""

    examples: "grain.MapDataset"
    batch_size: int

    def __call__(self, batch: int, row: int) -> _Example | RecordError:
        return cast(_Example | RecordError, self.examples[batch * self.batch_size + row])


def _in_order(data: DataConfig, batch_size: int, seed: int, records: Indices | None) -> _Order:
    count = len(data.source) if records is None else len(records)
    positions = grain.MapDataset.range(count).seed(seed)
    if data.shuffle:
        positions = positions.shuffle()
    positions = positions.repeat()
    if records is not None:
        positions = positions.map(_Nth(records))
    return _OneShape(positions.random_map(_Read(data)), batch_size)


@dataclass(frozen=True)
class _ShapeByBatch:
    """Images of one of several shapes, and references of such, in each batch."""

    data: DataConfig
    plan: BucketPlan
    records: Indices
    seed: int

    def __call__(self, batch: int, row: int) -> _Example | RecordError:
        shapes, epoch, places = self.plan.batch(batch)
        index = int(self.records[places[row]])
        return _Read(self.data)(index, np.random.default_rng((self.seed, epoch, index)), shapes)


def _in_buckets(data: DataConfig, batch_size: int, seed: int, records: Indices | None) -> _Order:
    records = np.arange(len(data.source)) if records is None else records
    sizes, most = _sizes(data)[records], data.transforms.references
    if most and not sizes[:, 1:].any():
        raise UserError(
            f"data.transforms.references is {most} but no record has a reference image: expected "
            "some; name their column in data.source.reference, or set it to 0."
        )
    plan = BucketPlan(
        sizes,
        data.transforms.shapes,
        batch_size=batch_size,
        seed=seed,
        shuffle=data.shuffle,
        fixed=isinstance(data.source, CachedLatents),
    )
    return _ShapeByBatch(data, plan, records, seed)


def _sizes(data: DataConfig) -> Int[np.ndarray, "n images 2"]:
    """Return width and height of every image and its references, as many as are read.

    Unreadable images, which fail later, are square.
    """
    source, most = data.source, data.transforms.references
    if isinstance(source, CachedLatents):
        return source.sizes(most)

    def size(index: int) -> list[tuple[int, int]]:
        try:
            return stored_sizes(source[index])
        except RecordError:
            return [(1, 1)]

    found = read_all(source, size, "Reading the sizes of the images", max(data.threads, 8))
    sizes = np.zeros((len(found), 1 + most, 2), int)
    for row, images in zip(sizes, found, strict=True):
        row[: len(images)] = images[: len(row)]
    return sizes


@dataclass(frozen=True)
class _ReadRows:
    """Reads a host's rows of one batch.

    The next usable record of the batch replaces an unusable one, whichever host reads that row:
    hosts need not communicate, and a batch does not depend on their number.
    """

    order: _Order
    batch_size: int
    rows: tuple[int, ...]

    def __call__(self, batch: int) -> list[_Example]:
        return [self._filled(batch, row) for row in self.rows]

    def _filled(self, batch: int, row: int) -> _Example:
        bad: list[str] = []
        for place in range(row, row + self.batch_size):
            made = self.order(batch, place % self.batch_size)
            if not isinstance(made, RecordError):
                return {**made, "bad": bad[:1]}  # the others are reported by their own rows
            bad.append(str(made))
        raise too_many(bad, f"All {len(bad)} records of a batch")


def _in_workers(batches: "grain.IterDataset", data: DataConfig) -> "grain.IterDataset":
    """Read batches in `data.workers` processes, which take turns."""
    if not flags.FLAGS.is_parsed():  # Grain's processes read absl flags, which we do not use
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(
        num_workers=data.workers, per_worker_buffer_size=data.prefetch
    )
    return batches.mp_prefetch(options, worker_init_fn=_start_worker)


def _start_worker(_index: int, _count: int) -> None:
    """Ignore signals that ask to end, and end with the main process.

    The signals reach all processes of a job, but the main one needs batches until it has saved.
    """
    ignore_signals()
    end_with_parent()


def host_rows(sharding: jax.sharding.Sharding, batch_size: int) -> list[int]:
    """Return the rows of a batch on this host's devices, ascending.

    Rows of different hosts overlap only where the mesh axes `tensor` or `context` span hosts.
    """
    places = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = range(batch_size)
    return sorted({row for place in places if place is not None for row in rows[place[0]]})


def device_batches(
    dataset: "grain.IterDataset",
    sharding: jax.sharding.Sharding,
    *,
    batch_size: int,
    prefetch: int = 2,
) -> "grain.IterDataset":
    """Move each host's rows into global arrays of `batch_size` rows, `prefetch` batches ahead."""
    rows = host_rows(sharding, batch_size)

    def spread(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = range(batch_size)[index[0]]
            start = bisect.bisect_left(rows, wanted[0])
            return local[start : start + len(wanted)]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    def move(batch: dict[str, Any]) -> dict[str, Any]:
        arrays = {key: jax.tree.map(spread, batch[key]) for key in ON_DEVICE if key in batch}
        return {**batch, **arrays}

    return grain.experimental.ThreadPrefetchIterDataset(
        dataset.map(move), prefetch_buffer_size=prefetch
    )
