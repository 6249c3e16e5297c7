"""Write shards on an engine for parallel data processing, through Apache Beam's runners.

Every shard is one element: a worker writes it and its entry into the output folder, which all
workers share, so that bytes, manifest and resumption are those of the local way.
"""

import contextlib
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from jaxdiff.data.shard_writer import RecordReader, ShardRange, Workers, write_images
from jaxdiff.data.sources.cached_latents import LatentOptions
from jaxdiff.errors import UserError
from jaxdiff.training.latent_cache import Cache, make_cache, write_latents
from jaxdiff.training.recipe import Config

_WHERE = re.compile(r" \[while running '.*'\]$")  # that Beam appends to the errors of workers


class ShardWriter:
    """Writes shards in a worker, which loads the encoders of latents once, for its accelerators.

    Args:
      folder: that all workers write to.
      reader: of the records.
      config: recipe whose encoders make latents; None for images.
      latents: their options.
    """

    def __init__(
        self, folder: str, reader: RecordReader, config: Config | None, latents: LatentOptions
    ):
        self._folder, self._reader = folder, reader
        self._config, self._latents = config, latents
        self._cache: Cache | None = None

    def __call__(self, part: ShardRange) -> None:
        """Write a shard and its entry."""
        if self._config is None:
            write_images(self._reader, (self._folder, part))
            return
        if self._cache is None:  # after it was sent to the worker
            self._cache = make_cache(self._config, self._latents)
        workers = Workers(0, self._reader)
        folder = epath.Path(self._folder)
        for _ in write_latents(folder, [part], workers, self._cache, lambda _: None):
            pass


class RunnerOptions(NamedTuple):
    """A runner of Apache Beam by name, and its options, each `name=value` or `name`."""

    name: str
    options: Sequence[str] = ()


@contextlib.contextmanager
def run_on_beam(
    runner: RunnerOptions, writer: ShardWriter, todo: Sequence[ShardRange]
) -> Iterator[threading.Event]:
    """Write shards on a runner within the context, which cancels what still runs at its end.

    Yields:
      An event that is set when all are written, or the first one failed.

    Raises:
      UserError: at the end of the context: Apache Beam is not installed, there is no such runner,
        it stopped, or the data are unusable.
    """
    pipeline = _pipeline(runner, writer, todo)
    done, failed, running = threading.Event(), [], []

    def run() -> None:
        try:
            running.append(pipeline.run())
            running[0].wait_until_finish()
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    # A daemon: an interrupted command does not wait for runners that work in this process.
    threading.Thread(target=run, daemon=True).start()
    try:
        yield done
    finally:
        if not done.is_set() and running:
            running[0].cancel()
    if failed:
        raise _refusal(runner, failed[0]) from failed[0]


def _pipeline(runner: RunnerOptions, writer: ShardWriter, todo: Sequence[ShardRange]) -> Any:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            "--runner needs the package apache-beam, which is not installed: run "
            "pip install -e '.[beam]' in a clone of jaxdiff."
        ) from None

    for option in runner.options:
        if option.startswith("-") or not option.partition("=")[0].isidentifier():
            raise UserError(
                f"--runner-options {option}: expected name=value, such as project=mine, no dashes."
            )
    flags = [f"--{option}" for option in runner.options]
    try:
        pipeline = beam.Pipeline(runner=runner.name, options=PipelineOptions(flags))
    except (ValueError, ImportError, AttributeError, RuntimeError) as error:
        raise _refusal(runner, error) from error
    # Reshuffle: a runner otherwise fuses the list with the writing, in one worker.
    _ = pipeline | beam.Create(list(todo)) | beam.Reshuffle() | beam.Map(writer)
    return pipeline


def _refusal(runner: RunnerOptions, error: BaseException) -> BaseException:
    """Return the sentence for an error of a runner, or of the data."""
    said = _WHERE.sub("", str(error).strip())
    if isinstance(error, UserError):
        return UserError(said)
    if isinstance(error, Exception):
        lines = said.splitlines() or [type(error).__name__]
        return UserError(
            f"The runner {runner.name} stopped: {lines[0]}: expected one of Apache Beam's runners "
            "with its options; repeat the command to continue with the shards that are missing."
        )
    return error
