"""TensorBoard's event files, written without TensorFlow and PyTorch."""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from jaxdiff.io.files import reason
from jaxdiff.io.imports import without_torch

with without_torch():
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
    from tensorboardX.record_writer import directory_check

FLUSH_SECONDS = 120.0  # between flushes of the file


class TensorBoard:
    """An event file of TensorBoard. An error is reported once, and ends the file, not the run.

    Args:
      folder: of the file.
      first: steps from this one on replace those of an earlier file.

    Raises:
      ImportError: a package that writes to this storage is missing.
    """

    def __init__(self, folder: str, first: int):
        self._folder = folder
        self._writer: EventsWriter | None = None
        self._flushed_at = -math.inf
        with self._guard():
            directory_check(folder)
            self._writer = EventsWriter(os.path.join(folder, "events"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=first, file_version="brain.Event:2"))
        self._write(Event(step=first, session_log=start))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a number."""
        self._write(Event(step=step, summary=summary.scalar(name, value)))

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Add an image uint8 [h, w, 3]."""
        self._write(Event(step=step, summary=summary.image(name, image, dataformats="HWC")))

    def _write(self, event: Event) -> None:
        if self._writer is None:
            return
        event.wall_time = time.time()
        with self._guard():
            self._writer.write_event(event)
            if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
                self._writer.flush()
                self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Write what is still in memory, and close the file."""
        with self._guard():
            if self._writer is not None:
                self._writer.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except ImportError:
            raise
        except Exception as error:  # the storage clients' exceptions share no base class
            self._writer = None
            logging.getLogger(__name__).warning(
                "%s cannot be written (%s): TensorBoard shows nothing from here on.",
                self._folder,
                reason(error),
            )
