"""The account of a data set: every record found is used, or rejected by name and with a reason.

    found = used + rejected

A source rejects some records while it indexes its files (`left_out_of`), others turn out to be
unusable when they are read (`RecordError`). `Account` checks that both together are complete.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxdiff.errors import UserError

WINDOW = 10_000  # records over which the fraction of bad ones is measured
MINIMUM = 500  # records seen before the fraction is checked
_NAMED = 5  # bad records that an error names

# Kinds of reasons, as they follow a number: "3 without a caption".
UNREADABLE = "unreadable"
NO_CAPTION = "without a caption"
NO_IMAGE = "without an image"
NO_REFERENCE = "without a reference image"
MANY_REFERENCES = "with too many reference images"
NOT_TEXT = "with a caption that is no text"
TOO_LARGE = "too large"
UNSUPPORTED = "of an unsupported format"
UNLISTED = "not in the metadata"
REPEATED = "repeated or beside another image"
NO_FILE = "not a regular file"
ELSEWHERE = "in files of another format"


@dataclass(frozen=True, kw_only=True)
class Reject:
    """One record left out.

    Attributes:
      name: of the record, or of the file in which it is.
      reason: why it cannot be used.
      kind: of the reason: one of a few, by which rejects are counted.
    """

    name: str
    reason: str
    kind: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class RecordError(Exception):
    """One record cannot be used; the message names it and the reason. The pipeline skips it."""

    def __init__(self, reason: str, kind: str = UNREADABLE, name: str = ""):
        super().__init__(reason, kind, name)  # its arguments are pickled
        self._reason, self._kind, self._name = reason, kind, name

    def __str__(self) -> str:
        return f"{self._name}: {self._reason}" if self._name else self._reason

    def of(self, name: str) -> "RecordError":
        """Return the same error of the record `name`."""
        return RecordError(self._reason, self._kind, name)

    def within(self, part: str) -> "RecordError":
        """Return the same error in a part of the record."""
        return RecordError(f"{part}: {self._reason}", self._kind, self._name)

    @property
    def reject(self) -> Reject:
        """The record as one that is left out."""
        return Reject(name=self._name, reason=self._reason, kind=self._kind)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What a source found in its files but has no record of.

    Attributes:
      rejects: records that cannot be used, and files that may contain such.
      others: number of files, by suffix, that are neither images nor captions.
    """

    rejects: Sequence[Reject] = ()
    others: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, more: "LeftOut") -> "LeftOut":
        others = Counter(self.others) + Counter(more.others)
        return LeftOut(rejects=(*self.rejects, *more.rejects), others=dict(others))


def left_out_of(source: Any) -> LeftOut:
    """Return what a source left out while it indexed its files.

    A source states that in an attribute `left_out`; one without it left out nothing.
    """
    return getattr(source, "left_out", LeftOut())


@dataclass(frozen=True, kw_only=True)
class Account:
    """The number of records found and used, and all that were left out.

    Raises:
      UserError: the numbers do not sum: the data changed while they were read.
    """

    found: int
    used: int
    left_out: LeftOut

    def __post_init__(self):
        if self.found != self.used + len(self.left_out.rejects):
            raise UserError(
                f"Of {self.found} records found, {self.used} are used and "
                f"{len(self.left_out.rejects)} rejected: expected these to sum; the data changed "
                "meanwhile, so start again in another folder."
            )

    @property
    def reasons(self) -> dict[str, int]:
        """The number of rejects by kind of reason, the most frequent first."""
        return dict(Counter(reject.kind for reject in self.left_out.rejects).most_common())

    def text(self, used: str = "") -> str:
        """Return the account as a sentence; `used` says what was done with the used ones."""
        rejects, others = self.left_out.rejects, self.left_out.others
        text = f"Found {self.found} record{'s' * (self.found != 1)}{used and ', ' + used}"
        if rejects:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.reasons.items())
            text += f", left out {len(rejects)}: {kinds}"
        if others:
            most = Counter(others).most_common()
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in most[:_NAMED])
            more = ", ..." if len(most) > _NAMED else ""
            total = sum(others.values())
            text += f"; ignored {total} other file{'s' * (total != 1)}: {kinds}{more}"
        return text + "."

    def check(self, max_fraction: float) -> None:
        """Raise `UserError` if more than `max_fraction` of the records are rejected.

        The limit applies to `MINIMUM` records or more; if `max_fraction` is 0, to any number.
        """
        rejects = self.left_out.rejects
        checked = self.found >= MINIMUM or max_fraction == 0
        if checked and len(rejects) > max_fraction * self.found:
            raise too_many(
                list(map(str, rejects[:_NAMED])),
                f"{len(rejects) / self.found:.1%} of the {self.found} records found "
                f"(allowed: {max_fraction:.1%})",
            )


def account_of(source: Any) -> Account:
    """Return the account of a source after it has indexed its files, before records are read."""
    left_out = left_out_of(source)
    count = len(source)
    return Account(found=count + len(left_out.rejects), used=count, left_out=left_out)


def some(rejects: Sequence[Reject], count: int = 3) -> str:
    """Return the first few rejects for an error message, or ''."""
    more = f"; and {len(rejects) - count} more" if len(rejects) > count else ""
    return "; ".join(map(str, rejects[:count])) + more


def too_many(names: Sequence[str], what: str) -> UserError:
    """Return the error that ends a run on bad data; it names the last few bad records."""
    named = "; ".join(names[-_NAMED:])
    return UserError(
        f"{what} cannot be used, among them {named}; repair or remove them, "
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
