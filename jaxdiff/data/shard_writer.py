"""Write the shards of a folder independently of each other, so that a job can be resumed.

The bytes of a shard depend only on the settings and its number. A shard is written under a
temporary name and renamed before its progress entry is written.
"""

import dataclasses
import hashlib
import io
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from etils import epath

from jaxdiff.config.serialization import flatten
from jaxdiff.data.bad_records import RecordError, Reject
from jaxdiff.data.buckets import nearest_shape
from jaxdiff.data.shards import Shard, shard_from_json
from jaxdiff.data.sources.array_record import encode_record, write_encoded
from jaxdiff.data.sources.base import Record, digest_of, images_of
from jaxdiff.data.sources.prior_preservation import AnySource, PriorPreservation
from jaxdiff.data.transforms import Transforms, View, stored_sizes
from jaxdiff.data.workers import end_with_parent, ignore_signals, signals_blocked
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.io.text import format_json, read_json

_PROGRESS = ".shards"
_PROVENANCE = "provenance.json"

T = TypeVar("T")
R = TypeVar("R")


class ShardRange(NamedTuple):
    """The range of source records that one shard contains."""

    number: int
    shards: int
    start: int
    stop: int

    def holds(self, shard: Shard) -> bool:
        """Whether a shard accounts for every record of the range."""
        return shard.records + len(shard.rejects) == self.stop - self.start

    @property
    def file(self) -> str:
        """The shard's file name."""
        return f"records-{self.number:05d}-of-{self.shards:05d}.array_record"


def shard_ranges(records: int, shards: int) -> list[ShardRange]:
    """Split `records` into ranges whose lengths differ by at most one."""
    starts = [records * i // shards for i in range(shards + 1)]
    return [ShardRange(i, shards, starts[i], starts[i + 1]) for i in range(shards)]


@dataclass(frozen=True, kw_only=True)
class RecordReader:
    """Reads records and checks that they can be trained on."""

    source: AnySource | PriorPreservation
    transforms: Transforms

    def image(self, index: int) -> Record | RecordError:
        """Return a record, with all its references, or the reason why it is unusable."""
        try:
            record = self.source[index]
            count = len(images_of(record)) - 1
            transforms = dataclasses.replace(self.transforms, references=count)
            transforms(record, np.random.default_rng(0))
        except RecordError as error:
            return error
        return record

    def views(self, index: int, count: int) -> "Crops | RecordError":
        """Return `count` crops of a record in the nearest shapes, or why it is unusable."""
        shapes = self.transforms.shapes
        try:
            record = self.source[index]
            nearest = [0] * len(images_of(record))
            if len(shapes) > 1:
                nearest = nearest_shape(np.array(stored_sizes(record)), shapes).tolist()
            views = self.transforms.views(record, count, [shapes[i] for i in nearest])
            digest = digest_of(self.source, index, record)
        except RecordError as error:
            return error
        return Crops(nearest, views, record["captions"], record["name"], digest)


class Crops(NamedTuple):
    """The crops of one image and its references that an autoencoder encodes."""

    shapes: list[int]  # indices of the shapes of image and references
    views: list[View]
    captions: list[str]
    name: str
    digest: str


class ShardProgress:
    """Entries of the shards that are complete, kept until the manifest is written.

    Args:
      folder: of the shards.
      provenance: their source and settings.
      alone: whether no other machine writes shards, so that settings of which there is no complete
        shard may be replaced.

    Raises:
      UserError: the folder contains shards of another source or other settings.
    """

    def __init__(self, folder: epath.Path, provenance: dict[str, Any], *, alone: bool):
        self._folder = folder / _PROGRESS
        path = self._folder / _PROVENANCE
        if path.exists() and not (alone and not self._entries()):
            check_same(read_json(path, "another folder"), provenance, folder)
        write_whole(path, (format_json(provenance, indent=1) + "\n").encode())

    def read(self) -> dict[str, Shard]:
        """Return the complete shards by file name."""
        try:
            shards = [shard_from_json(read_json(x, "another folder")) for x in self._entries()]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self._folder} holds an entry of another version of jaxdiff ({error}): choose "
                "another output folder."
            ) from error
        return {shard.file: shard for shard in shards}

    def _entries(self) -> list[epath.Path]:
        return [path for path in self._folder.iterdir() if path.name.startswith("records-")]

    def remove(self) -> None:
        """Delete all entries, once the manifest contains them."""
        self._folder.rmtree()


def check_same(there: dict[str, Any], provenance: dict[str, Any], folder: epath.Path) -> None:
    """Raise `UserError` if a folder has another source or other settings."""
    old, new = flatten(there), flatten(provenance)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if keys:
        changes = "; ".join(f"{key} is {old.get(key)}, now {new.get(key)}" for key in keys[:3])
        raise UserError(
            f"{folder} contains shards made with other settings ({changes}): choose another "
            "folder, or remove that one."
        )


def write_shard(
    folder: epath.Path,
    shard_range: ShardRange,
    records: Iterable[bytes],
    rejects: Sequence[Reject],
    shapes: Sequence[Sequence[int]] = (),
) -> Shard:
    """Write a shard and its entry; consuming `records` may extend `rejects` and `shapes`.

    `shapes` are those of `Crops` for each record.
    """
    path = folder / shard_range.file
    count = write_encoded(str(path), records)
    with path.open("rb") as file:
        digest = hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
    references = [places for _, *places in shapes]
    shard = Shard(
        file=shard_range.file,
        records=count,
        bytes=path.stat().length,
        sha256=digest,
        rejects=tuple(rejects),
        shapes=[image for image, *_ in shapes] if any(image for image, *_ in shapes) else (),
        references=references if any(references) else (),
    )
    entry = format_json(dataclasses.asdict(shard))
    write_whole(folder / _PROGRESS / f"{shard.file}.json", entry.encode())
    return shard


def write_images(reader: RecordReader, job: tuple[str, ShardRange]) -> Shard:
    """Write a shard of the source's images, leaving out unusable records."""
    folder, shard_range = job
    rejects: list[Reject] = []

    def encoded() -> Iterator[bytes]:
        for index in range(shard_range.start, shard_range.stop):
            record = reader.image(index)
            if isinstance(record, RecordError):
                rejects.append(record.reject)
            else:
                yield encode_record(record)

    return write_shard(epath.Path(folder), shard_range, encoded(), rejects)


class Workers:
    """`count` reading processes; with 0, this process reads when a result is requested."""

    def __init__(self, count: int, reader: RecordReader):
        self._count, self._reader, self._pool = count, reader, None
        self._ahead: deque[Future[Any]] = deque()
        if count:
            context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
            with signals_blocked():
                self._pool = ProcessPoolExecutor(count, context, _start, (reader,))

    def map(self, function: Callable[[RecordReader, T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield `function(reader, item)` in order, computing just far enough ahead.

        Raises:
          UserError: a process died.
        """
        if self._pool is None:
            yield from (function(self._reader, item) for item in items)
            return
        ahead = self._ahead
        try:
            for item in items:
                with signals_blocked():  # processes start on demand
                    ahead.append(self._pool.submit(_work, function, item))
                if len(ahead) > 2 * self._count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "A worker process ended unexpectedly, perhaps because memory ran out: repeat the "
                "command with fewer --workers; it keeps the shards that are complete."
            ) from error

    def close(self) -> None:
        """End the processes; pending work is dropped."""
        if self._pool is not None:
            if not all(future.done() for future in self._ahead):
                for process in multiprocessing.active_children():
                    process.terminate()
            self._pool.shutdown(cancel_futures=True)


_reader: RecordReader | None = None  # of a worker process: sent once, not with every item


def _work(function: Callable[[RecordReader, T], R], item: T) -> R:
    assert _reader is not None
    try:
        return function(_reader, item)
    except SystemExit:  # its partial file is removed
        os._exit(128 + signal.SIGTERM)


def _start(reader: RecordReader) -> None:
    """Start a worker, which ends at SIGTERM and with the main process, not at other signals."""
    global _reader
    _reader = reader

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    ignore_signals(signal.SIGINT, signal.SIGHUP)
    end_with_parent()
