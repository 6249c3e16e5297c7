"""Unusable records: the error of one, and the limit on their fraction."""

from collections import deque
from collections.abc import Sequence

from jaxdiff.errors import UserError

WINDOW = 10_000  # records over which the fraction of bad ones is measured
MINIMUM = 500  # records seen before the fraction is checked
_NAMED = 5  # bad records that an error names


class RecordError(Exception):
    """One record cannot be used; the message names it and the reason. The pipeline skips it."""


def too_many(names: Sequence[str], what: str) -> UserError:
    """Return the error that ends a run on bad data; it names the last few bad records."""
    some = "; ".join(names[-_NAMED:])
    return UserError(
        f"{what} cannot be used, among them {some}; repair or remove them, "
        "or raise data.max_bad_fraction."
    )


class BadRecords:
    """Limits the fraction of bad records among about the last `WINDOW` records.

    The limit applies once `MINIMUM` records were seen; if `max_fraction` is 0, at once.
    """

    def __init__(self, max_fraction: float):
        self._max_fraction = max_fraction
        self._bad = 0.0
        self._seen = 0.0
        self._names: deque[str] = deque(maxlen=_NAMED)

    def add(self, skipped: int, names: Sequence[str], good: int) -> None:
        """Count one batch: `good` records used, `skipped` ones left out, described by `names`.

        Raises:
          UserError: more than `max_fraction` of the records are bad; names some of them.
        """
        self._bad += skipped
        self._seen += skipped + good
        self._names.extend(names)
        checked = self._seen >= MINIMUM or self._max_fraction == 0
        if checked and self._bad > self._max_fraction * self._seen:
            raise too_many(
                list(self._names),
                f"{self._bad / self._seen:.1%} of the last {self._seen:.0f} records "
                f"(allowed: {self._max_fraction:.1%})",
            )
        if self._seen >= WINDOW:  # halve both counts, so that older records weigh less
            self._bad /= 2
            self._seen /= 2
