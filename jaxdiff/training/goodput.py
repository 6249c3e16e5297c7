"""The fraction of a run's time that went into the steps of its result."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from jaxdiff.distributed.multihost import is_host0
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.io.text import format_json, read_json

STARTS = "starts.json"


class Goodput:
    """Seconds of steps over seconds since the first start of a run, however often it restarted.

    Each step counts once, at the rate of its line of metrics. Everything else is lost time: steps
    taken again after an interruption, start-up, compilation, evaluation, and waiting for a restart.

    Args:
      folder: of the run, whose `starts.json` lists the starts in seconds since 1970.
      first: steps taken before this start.
      batch_size: images in a step.
      records: lines of metrics up to step `first`, in order.
      clock: time in seconds since 1970.
    """

    def __init__(
        self,
        folder: epath.Path,
        *,
        first: int,
        batch_size: int,
        records: Iterable[Mapping[str, Any]] = (),
        clock: Callable[[], float] = time.time,
    ):
        self._batch_size, self._clock = batch_size, clock
        self._step, self._useful = 0, 0.0
        for record in records:
            self.add(record)
        self._step = first
        self._starts = [*_read_starts(folder / STARTS), clock()]
        if is_host0():
            write_whole(folder / STARTS, format_json({"starts": self._starts}).encode())

    def add(self, record: Mapping[str, Any]) -> None:
        """Count the steps since the last record; one without `images_per_s` is left out."""
        rate, step = record.get("images_per_s"), record["step"]
        if rate:
            self._useful += (step - self._step) * self._batch_size / rate
            self._step = step

    def totals(self) -> dict[str, float]:
        """Return `goodput` in [0, 1], `restarts`, and `wall_s` in seconds since the first start."""
        wall = max(self._clock() - self._starts[0], self._useful, 1e-9)
        restarts = len(self._starts) - 1
        return {"goodput": self._useful / wall, "restarts": restarts, "wall_s": wall}


def _read_starts(path: epath.Path) -> list[float]:
    """Return the starts before this one; none where they cannot be read."""
    try:
        return [float(start) for start in read_json(path)["starts"]]
    except (UserError, LookupError, TypeError, ValueError):
        return []
