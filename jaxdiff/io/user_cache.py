"""The user's cache folder, and what its entries depend on.

$JAXDIFF_CACHE, or $XDG_CACHE_HOME/jaxdiff, or ~/.cache/jaxdiff
  compiled/        compiled programs
  plans/           plans of `jaxdiff plan`
"""

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from etils import epath

VARIABLE = "JAXDIFF_CACHE"
"""Names another folder, local or in cloud storage; "off" is no cache."""


def user_cache(kind: str, environment: Mapping[str, str] = os.environ) -> epath.Path | None:
    """Return the folder for entries of a kind; None if there is to be none, or no home."""
    given = environment.get(VARIABLE)
    if given == "off":
        return None
    if given:
        return epath.Path(os.path.expanduser(given)) / kind
    base = environment.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the XDG specification asks for
        base = os.path.expanduser("~/.cache")
    # Without a home, "~" remains.
    return epath.Path(base) / "jaxdiff" / kind if os.path.isabs(base) else None


@functools.cache
def package_digest() -> str:
    """Return the SHA-256 of this package's source, which decides on its programs."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
