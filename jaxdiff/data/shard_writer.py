"""Making the shards of a folder, each by itself, so that what was whole before a stop stays.

A shard is a function of its number alone: it holds the records of one stretch of the source, and
is written under a temporary name and then renamed, before the note that tells of it. So whoever
goes on later, or elsewhere, with the same settings ends with the same bytes.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.buckets import nearest
from jaxdiff.data.shards import Shard
from jaxdiff.data.sources.array_record import encode_record, write_encoded
from jaxdiff.data.sources.base import Record
from jaxdiff.data.sources.prior_preservation import Source, WithPrior
from jaxdiff.data.transforms import Transforms, View, stored_size
from jaxdiff.data.workers import end_with_parent
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole

NOTES = ".shards"
_PLAN = "made_of.json"
_READ = 1 << 20

T = TypeVar("T")
R = TypeVar("R")


class Stretch(NamedTuple):
    """The records of the source that a shard is made of."""

    number: int
    shards: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        """The shard's name."""
        return f"records-{self.number:05d}-of-{self.shards:05d}.array_record"


def stretches(records: int, shards: int) -> list[Stretch]:
    """All of them, of equal length up to one record."""
    starts = [records * i // shards for i in range(shards + 1)]
    return [Stretch(i, shards, starts[i], starts[i + 1]) for i in range(shards)]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How records are read and judged."""

    source: Source | WithPrior
    transforms: Transforms

    def image(self, index: int) -> Record | RecordError:
        """A record that can be trained on, or what is wrong with it."""
        try:
            record = self.source[index]
            self.transforms(record, np.random.default_rng(0))
        except RecordError as error:
            return error
        return record

    def views(self, index: int, count: int) -> "Crops | RecordError":
        """The crops of a record, of the shape that is nearest to it, or what is wrong with it."""
        shapes = self.transforms.shapes
        try:
            record, place = self.source[index], 0
            if len(shapes) > 1:
                place = int(nearest(np.array([stored_size(record["image"])]), shapes)[0])
            views = self.transforms.views(record, count, shapes[place])
        except RecordError as error:
            return error
        return Crops(place, views, record["captions"], record["name"])


class Crops(NamedTuple):
    """An image as it goes into the autoencoder."""

    shape: int  # its place in the list of shapes
    views: list[View]
    captions: list[str]
    name: str


class Notes:
    """What is known of the shards that are whole, while others are still to be made.

    Raises:
      UserError: the folder has shards that were made of something else.
    """

    def __init__(self, folder: epath.Path, made_of: dict[str, Any]):
        self._folder = folder / NOTES
        plan = self._folder / _PLAN
        if plan.exists():
            check_same(json.loads(plan.read_text()), made_of, folder)
        write_whole(plan, (json.dumps(made_of, indent=1) + "\n").encode())

    def read(self) -> dict[str, Shard]:
        """By file name."""
        notes = [path for path in self._folder.iterdir() if path.name.startswith("records-")]
        shards = [Shard(**json.loads(path.read_bytes())) for path in notes]
        return {shard.file: shard for shard in shards}

    def remove(self) -> None:
        """All of them, once the manifest says the same."""
        self._folder.rmtree()


def check_same(there: dict[str, Any], made_of: dict[str, Any], folder: epath.Path) -> None:
    """Raises `UserError` where a folder was begun with other data or settings."""
    keys = [key for key in {**there, **made_of} if there.get(key) != made_of.get(key)]
    if keys:
        told = "; ".join(f"{key} is {there.get(key)}, now {made_of.get(key)}" for key in keys[:2])
        raise UserError(
            f"{folder} holds shards that were made otherwise ({told}): choose another folder, or "
            "remove that one."
        )


def write_shard(
    folder: epath.Path,
    stretch: Stretch,
    records: Iterable[bytes],
    rejects: Sequence[str],
    shapes: Sequence[int] = (),
) -> Shard:
    """Writes one shard, and its note; `rejects` and `shapes` may grow while `records` are taken."""
    path = folder / stretch.file
    count = write_encoded(str(path), records)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ):
            digest.update(block)
    shard = Shard(
        file=stretch.file,
        records=count,
        bytes=path.stat().length,
        sha256=digest.hexdigest(),
        rejects=tuple(rejects),
        shapes=tuple(shapes),
    )
    note = json.dumps(dataclasses.asdict(shard))
    write_whole(folder / NOTES / f"{shard.file}.json", note.encode())
    return shard


def write_images(reading: Reading, job: tuple[str, Stretch]) -> Shard:
    """A shard of images as the source has them; those that could not be trained on are left out."""
    folder, stretch = job
    rejects: list[str] = []

    def encoded() -> Iterator[bytes]:
        for index in range(stretch.start, stretch.stop):
            record = reading.image(index)
            if isinstance(record, RecordError):
                rejects.append(str(record))
            else:
                yield encode_record(record)

    return write_shard(epath.Path(folder), stretch, encoded(), rejects)


class Workers:
    """`count` processes that read; with none, this one does it when a result is asked for."""

    def __init__(self, count: int, reading: Reading):
        self._count, self._reading, self._pool = count, reading, None
        if count:
            context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
            self._pool = ProcessPoolExecutor(count, context, _start, (reading,))

    def map(self, function: Callable[[Reading, T], R], items: Iterable[T]) -> Iterator[R]:
        """`function(reading, item)` in order, as many ahead of their use as keep all busy.

        Raises:
          UserError: a process came to a sudden end.
        """
        if self._pool is None:
            for item in items:
                yield function(self._reading, item)
            return
        ahead: deque[Future[R]] = deque()
        with self._told():
            for item in items:
                ahead.append(self._pool.submit(_work, function, item))
                if len(ahead) > 2 * self._count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def close(self) -> None:
        """Ends the processes; what they have not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool as error:
            raise UserError(
                "A worker process came to a sudden end, perhaps for want of memory: give the "
                "command again, with fewer --workers; it goes on from the shards that are whole."
            ) from error


_reading: Reading | None = None  # of a worker process: sent once, not with each piece of work


def _work(function: Callable[[Reading, T], R], item: T) -> R:
    assert _reading is not None
    return function(_reading, item)


def _start(reading: Reading) -> None:
    """Ctrl-C is for the main process, without which workers do not stay either."""
    global _reading
    _reading = reading
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
