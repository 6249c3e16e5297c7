"""Check that a data set has a named column."""

import difflib
from collections.abc import Iterable

from jaxdiff.errors import UserError


def check_column(name: str, available: Iterable[str], *, key: str, where: str) -> None:
    """Raise `UserError` unless `name`, the value of data.source.`key`, is a column of `where`."""
    names = list(available)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(names) or "none"
    raise UserError(
        f"{where} has no column {name!r}: {hint}its columns are {listed}; "
        f"set data.source.{key} to one of them."
    )
