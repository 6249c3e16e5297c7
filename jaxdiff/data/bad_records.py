"""Records that cannot be read: how one is told, and when there are too many of them."""

from collections import deque
from collections.abc import Sequence

from jaxdiff.errors import UserError

WINDOW = 10_000  # records over which the share of bad ones is taken
MINIMUM = 500  # records seen before that share is judged
_NAMED = 5  # bad records that an error names


class RecordError(Exception):
    """One record cannot be used; the message names it and says why. The pipeline skips it."""


def too_many(names: Sequence[str], what: str) -> UserError:
    """The error that ends a run on bad data, naming the last few of the bad records."""
    some = "; ".join(names[-_NAMED:])
    return UserError(
        f"{what} cannot be used, among them {some}; repair or remove them, "
        "or raise data.max_bad_fraction."
    )


class BadRecords:
    """Judges the share of bad records among about the last `WINDOW` records.

    Nothing is judged before `MINIMUM` records were seen, unless `max_share` is 0: then the
    first bad record is one too many.
    """

    def __init__(self, max_share: float):
        self._max_share = max_share
        self._bad = 0.0
        self._seen = 0.0
        self._names: deque[str] = deque(maxlen=_NAMED)

    def add(self, skipped: int, names: Sequence[str], good: int) -> None:
        """Counts one batch: `good` records used, `skipped` ones left out, told by `names`.

        Raises `UserError`, naming some of them, once more than `max_share` were bad.
        """
        self._bad += skipped
        self._seen += skipped + good
        self._names.extend(names)
        judged = self._seen >= MINIMUM or self._max_share == 0
        if judged and self._bad > self._max_share * self._seen:
            raise too_many(
                list(self._names),
                f"{self._bad / self._seen:.1%} of the last {self._seen:.0f} records "
                f"(allowed: {self._max_share:.1%})",
            )
        if self._seen >= WINDOW:  # halving both forgets the past without keeping a list of it
            self._bad /= 2
            self._seen /= 2
