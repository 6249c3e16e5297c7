"""Write shards with Apache Beam: one element of the pipeline is one shard.

A worker reads, renders and encodes a whole shard with the code of the local way, so that the bytes
are the same, and writes it and its progress entry to the output folder, from which a run on any
runner resumes.
"""

import functools
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from jaxdiff.data.shard_writer import RecordReader, ShardRange, Workers, write_images
from jaxdiff.data.sources.cached_latents import LatentOptions
from jaxdiff.errors import UserError
from jaxdiff.training.latent_cache import make_cache, write_latents
from jaxdiff.training.recipe import Config

_LOOK_SECONDS = 2.0
_WHERE = re.compile(r" \[while running .*|\n.*", re.DOTALL)  # what Beam adds to a message


@dataclass(frozen=True, kw_only=True)
class BeamJob:
    """What workers need to write shards.

    Attributes:
      folder: that all workers reach, local or `gs://`.
      reader: of the records.
      config: recipe whose encoders make latents; None for images.
      latents: what is encoded.
    """

    folder: str
    reader: RecordReader
    config: Config | None
    latents: LatentOptions

    def write(self, shard_range: ShardRange) -> None:
        """Write a shard and its progress entry, in a worker."""
        if self.config is None:
            write_images(self.reader, (self.folder, shard_range))
            return
        cache = _encoders(self.config, self.latents)
        workers, folder = Workers(0, self.reader), epath.Path(self.folder)
        list(write_latents(folder, [shard_range], workers, cache, lambda _: None))


_encoders = functools.lru_cache(maxsize=1)(make_cache)  # once in each worker


def write_with_beam(
    job: BeamJob,
    todo: Sequence[ShardRange],
    runner: str,
    options: Sequence[str],
    look: Callable[[], None],
) -> None:
    """Write shards on a runner of Apache Beam, and wait until all are written.

    An interruption cancels what still runs.

    Args:
      job: of the folder.
      todo: the shards.
      runner: its name, such as "DirectRunner", "DataflowRunner" or "FlinkRunner".
      options: of Beam and the runner, each NAME=VALUE.
      look: called every two seconds meanwhile, to show progress.

    Raises:
      UserError: Beam is not installed or has no such runner; or a worker raised it.
    """
    beam, make_options = _import_beam()
    settings = make_options([f"--runner={runner}", *(f"--{option}" for option in options)])
    try:
        pipeline = beam.Pipeline(options=settings)
    except ValueError as error:
        raise UserError(f"Apache Beam does not start {runner!r}: {error}") from error
    shards = pipeline | "Shards" >> beam.Create(todo) | "One each" >> beam.Reshuffle()
    _ = shards | "Write" >> beam.Map(job.write)
    try:
        _run(pipeline, look)
    except Exception as error:  # that of a worker, or one of the runner with its text
        _, is_ours, message = str(error).rpartition("UserError: ")
        if not is_ours and not isinstance(error, UserError):
            raise
        raise UserError(_WHERE.sub("", message)) from error


def _run(pipeline: Any, look: Callable[[], None]) -> None:
    """Run a pipeline in a thread, since some runners return only when all is done."""
    results, errors, done = [], [], threading.Event()

    def run() -> None:
        try:
            results.append(pipeline.run())
            results[0].wait_until_finish()
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    # A daemon: an interrupted command does not wait for a runner that works in this process.
    threading.Thread(target=run, daemon=True).start()
    try:
        while not done.wait(_LOOK_SECONDS):
            look()
    finally:
        if results and not done.is_set():
            results[0].cancel()
    if errors:
        raise errors[0]


def _import_beam() -> tuple[Any, Any]:
    """Return the package, and its type of options."""
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            "--runner needs the package apache-beam, which is not installed: run "
            "pip install -e '.[beam]' in a clone of jaxdiff."
        ) from None
    return apache_beam, PipelineOptions
