"""The input pipeline: records, shuffled and split by host, into batches on the devices.

The position of a record in the endless, shuffled order fixes all that happens to it, and the
position is all that an iterator's state holds. So batches are the same in every run, and a
restored iterator goes on exactly where the saved one stood.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any, TypedDict

import grain
import jax
import numpy as np
import rich.progress
from absl import flags
from jaxtyping import Int, Int32, UInt8
from rich.console import Console

from jaxdiff.data.array_record import ArrayRecord
from jaxdiff.data.bad_records import MINIMUM, RecordError, too_many
from jaxdiff.data.buckets import Plan
from jaxdiff.data.folder import ImageFolder
from jaxdiff.data.openmoji import OpenMoji
from jaxdiff.data.parquet import Parquet
from jaxdiff.data.prior import WithPrior
from jaxdiff.data.produce import Produce
from jaxdiff.data.tfds import TFDS
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.data.transforms import Transforms, stored_size
from jaxdiff.errors import UserError

ON_DEVICE = ("image", "tokens", "framing")  # the rest of a batch is bookkeeping for the host


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on and how to feed it.

    `workers` processes per host make batches (0: this process does), and in each of them
    `threads` read and decode: one is fastest for small images, which are bound by Python's lock,
    several for photographs and for remote storage. `prefetch` is the number of batches that
    each worker makes ahead, and, whether there are workers or not, of those that wait on the
    devices. The run stops once a share of more than `max_bad_share` of the records is
    unreadable.
    """

    source: Produce | OpenMoji | ImageFolder | Parquet | ArrayRecord | TFDS | WithPrior
    transforms: Transforms
    workers: int = 0
    threads: int = 1
    prefetch: int = 2
    shuffle: bool = True
    max_bad_share: float = 0.01

    def __post_init__(self):
        if self.workers < 0 or self.threads < 1 or self.prefetch < 1:
            raise UserError(
                f"data.workers is {self.workers}, data.threads {self.threads} and data.prefetch "
                f"{self.prefetch}: expected at least 0, 1 and 1."
            )
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(
                f"data.max_bad_share is {self.max_bad_share}: expected a share from 0 to 1."
            )


class _Good(TypedDict):
    """One usable record, and the unusable ones passed over since the last usable one."""

    image: UInt8[np.ndarray, "h w c"]
    caption: str
    framing: Int32[np.ndarray, " 6"]
    bad: list[str]


@dataclass(frozen=True)
class _Read:
    """Reads and transforms one record; what is wrong with a bad one is returned, not raised."""

    data: DataConfig

    def __call__(
        self, index: int, rng: np.random.Generator, shape: tuple[int, int] | None = None
    ) -> _Good | RecordError:
        try:
            image, caption, framing = self.data.transforms(self.data.source[index], rng, shape)
        except RecordError as error:
            return error
        return {"image": image, "caption": caption, "framing": framing, "bad": []}


class _DropBad(grain.IterDataset):
    """Passes over bad records, telling of them in the next good one.

    Every element ends in a good record, so between elements nothing is pending and the
    parent's state says it all. `patience` bad records in a row raise `UserError`.
    """

    def __init__(self, parent: grain.IterDataset, patience: int):
        super().__init__(parent)
        self._patience = patience

    def __iter__(self) -> grain.DatasetIterator:
        return _DropBadIterator(self._parent.__iter__(), self._patience)


class _DropBadIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, patience: int):
        super().__init__(parent)
        self._patience = patience

    def __next__(self) -> _Good:
        bad: list[str] = []
        record: _Good | RecordError = next(self._parent)
        while isinstance(record, RecordError):
            bad.append(str(record))
            if len(bad) == self._patience:
                raise too_many(bad, f"{len(bad)} records in a row")
            record = next(self._parent)
        record["bad"] = bad
        return record

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)


@dataclass(frozen=True)
class _Collate:
    """Stacks records and tokenizes their captions, a batch at a time."""

    tokenizer: Tokenizer

    def __call__(self, records: Sequence[_Good]) -> dict[str, Any]:
        bad = [name for record in records for name in record["bad"]]
        tokens: Int32[np.ndarray, "b n"] = self.tokenizer([r["caption"] for r in records])
        return {
            "image": np.stack([record["image"] for record in records]),
            "tokens": tokens,
            "framing": np.stack([record["framing"] for record in records]),
            "skipped": len(bad),
            "bad": bad,
        }


def make_dataset(
    data: DataConfig, tokenizer: Tokenizer, *, batch_size: int, seed: int, host: int, num_hosts: int
) -> grain.IterDataset:
    """An endless data set of this host's batches, `batch_size` records each.

    A batch holds `image` uint8 [b, h, w, 3], `tokens` int32 [b, n], `framing` int32 [b, 6], and of
    the records passed over since the last batch their number, `skipped`, and what is wrong with
    each, `bad`.

    Each epoch is shuffled anew by `seed`, and the endless order is dealt out record by record
    to the hosts in turn: together they see every record once per epoch, whatever their number.
    With `Buckets`, h and w differ from batch to batch, though not from host to host, and a few
    records come twice (`Plan`); the sizes of all images are read first. The iterators' states are
    JSON-able; one can be restored under the same `data`, `batch_size`, `seed` and hosts.

    Raises `UserError` for unusable data, or fewer records than a batch; so does the iterator,
    where so many records in a row are bad that it would not end.
    """
    data.source.check()
    records = len(range(host, len(data.source), num_hosts))
    if batch_size > records:
        raise UserError(
            f"A batch of {batch_size} records per host is more than the {records} that the data "
            f"hold for host {host} of {num_hosts}: lower train.batch_size, or add data."
        )
    if data.transforms.buckets is None:
        dataset = _in_order(data, tokenizer, batch_size, seed, host, num_hosts)
    else:
        dataset = _in_buckets(data, tokenizer, batch_size, seed, host, num_hosts)
    return _in_workers(dataset, data) if data.workers else dataset


def _in_order(
    data: DataConfig, tokenizer: Tokenizer, batch_size: int, seed: int, host: int, num_hosts: int
) -> grain.IterDataset:
    """Images of one shape."""
    positions = grain.MapDataset.range(len(data.source)).seed(seed)
    if data.shuffle:
        positions = positions.shuffle()
    examples = positions.repeat().random_map(_Read(data))[host::num_hosts]
    # Above the share allowed, a long run of bad records is enough to stop at.
    records = len(range(host, len(data.source), num_hosts))
    patience = records if data.max_bad_share == 1 else min(records, MINIMUM)
    read = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=batch_size)
    good = _DropBad(examples.to_iter_dataset(read), patience)
    return good.batch(batch_size, batch_fn=_Collate(tokenizer))


def _in_buckets(
    data: DataConfig, tokenizer: Tokenizer, batch_size: int, seed: int, host: int, num_hosts: int
) -> grain.IterDataset:
    """Images of one of several shapes in each batch."""
    plan = Plan(
        _sizes(data),
        data.transforms.shapes,
        batch_size=batch_size * num_hosts,
        seed=seed,
        shuffle=data.shuffle,
    )
    rows = grain.MapDataset.range(sys.maxsize).map(_ReadRows(data, plan, seed, host, num_hosts))
    read = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.threads)
    return rows.map(_Collate(tokenizer)).to_iter_dataset(read)


def _sizes(data: DataConfig) -> Int[np.ndarray, "n 2"]:
    """Width and height of every image; one that cannot be told counts as square.

    Such a record fails when it is read in its turn, and is told of then.
    """

    def size(index: int) -> tuple[int, int]:
        try:
            return stored_size(data.source[index]["image"])
        except RecordError:
            return 1, 1

    count = len(data.source)
    with ThreadPool(max(data.threads, 8)) as pool:  # bound by the storage, not by the processor
        sizes = rich.progress.track(
            pool.imap(size, range(count), chunksize=64),
            description="Reading the sizes of the images",
            total=count,
            transient=True,
            console=Console(stderr=True),
        )
        return np.array(list(sizes))


@dataclass(frozen=True)
class _ReadRows:
    """Reads and transforms a host's rows of one batch, in one shape.

    Where a record is bad another of the batch takes its place, so that no other host need know.
    """

    data: DataConfig
    plan: Plan
    seed: int
    host: int
    num_hosts: int

    def __call__(self, batch: int) -> list[_Good]:
        shape, epoch, records = self.plan.rows(batch, self.host, self.num_hosts)
        read = _Read(self.data)
        made = [
            read(index, np.random.default_rng((self.seed, epoch, index)), shape)
            for index in records.tolist()
        ]
        good = [record for record in made if not isinstance(record, RecordError)]
        bad = [str(record) for record in made if isinstance(record, RecordError)]
        if not good:
            raise too_many(bad, f"All {len(bad)} records of a batch")
        filled: list[_Good] = [good[i % len(good)].copy() for i in range(len(made))]
        filled[0]["bad"] = bad
        return filled


def _in_workers(batches: grain.IterDataset, data: DataConfig) -> grain.IterDataset:
    """The same, made by `data.workers` processes that take the batches in turn."""
    if not flags.FLAGS.is_parsed():  # Grain's processes read absl flags, which we do not use
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(
        num_workers=data.workers, per_worker_buffer_size=data.prefetch
    )
    return batches.mp_prefetch(options, worker_init_fn=_start_worker)


def _start_worker(_index: int, _count: int) -> None:
    """Ctrl-C and SIGTERM, which reach all processes of a job, are for the main one.

    It takes batches until it has saved. Grain ends the workers by an event, or kills them; should
    the main process end without that, they end by themselves.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()


def to_device(
    dataset: grain.IterDataset, sharding: jax.sharding.Sharding, *, prefetch: int = 2
) -> grain.IterDataset:
    """Moves images, tokens and framing to the devices, `prefetch` batches ahead of their use.

    Each host's batch becomes its part of one global array laid out by `sharding`. The state
    of an iterator is that after the last batch taken from it, not the last one moved.
    """

    def move(batch: dict[str, Any]) -> dict[str, Any]:
        arrays = {
            key: jax.make_array_from_process_local_data(sharding, batch[key]) for key in ON_DEVICE
        }
        return {**batch, **arrays}

    return grain.experimental.ThreadPrefetchIterDataset(
        dataset.map(move), prefetch_buffer_size=prefetch
    )
