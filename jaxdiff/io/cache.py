"""The folder of this machine that results are kept in which can be computed again."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """Return the folder for results of one kind; None with JAXDIFF_CACHE=off.

    It is in JAXDIFF_CACHE, or in jaxdiff of XDG_CACHE_HOME, by default ~/.cache.
    """
    chosen = os.environ.get("JAXDIFF_CACHE", "")
    if chosen == "off":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(chosen) if chosen else Path(home) / "jaxdiff") / name
