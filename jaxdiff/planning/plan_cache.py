"""Keep plans, so that a search compiles each of its programs once.

A plan is a small file, named by the hash of all that it depends on: the recipe, the topology, XLA's
flags, the versions of JAX and libtpu, and this package's code. The folder is plans in JAXDIFF_CACHE
or in jaxdiff of the user's cache folder; JAXDIFF_CACHE=off keeps none.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from etils import epath

import jaxdiff
from jaxdiff.config.serialization import to_json
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.io.text import format_json, read_json
from jaxdiff.training.recipe import Config

MOST = 1000
"""Plans that are kept; the oldest go first."""


def plan_file(config: Config, topology: str, flags: tuple[str, ...], quick: bool) -> Path | None:
    """Return the file of a plan, there or not; None without a cache."""
    chosen = os.environ.get("JAXDIFF_CACHE", "")
    if chosen == "off":
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folder = (Path(chosen) if chosen else home / "jaxdiff").expanduser() / "plans"
    key = [to_json(config), topology, flags, quick, *_versions(), _code()]
    return folder / f"{hashlib.sha256(format_json(key).encode()).hexdigest()}.json"


def read_plan(file: Path | None) -> dict[str, Any] | None:
    """Return a plan that was kept; None if it is not there or damaged."""
    if file is None or not file.exists():
        return None
    with contextlib.suppress(UserError, OSError):
        return read_json(file)
    return None


def keep_plan(file: Path | None, plan: dict[str, Any]) -> None:
    """Write a plan and remove the oldest beyond `MOST`; a full or read-only disk is no error."""
    if file is None:
        return
    with contextlib.suppress(OSError, UserError):
        write_whole(epath.Path(file), format_json(plan).encode())
        kept = sorted(file.parent.glob("*.json"), key=lambda kept: -kept.stat().st_mtime)
        for old in kept[MOST:]:
            old.unlink(missing_ok=True)


def _versions() -> list[str]:
    found = []
    for name in ("jax", "jaxlib", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


@functools.cache
def _code() -> str:
    """Return the hash of this package's source, which decides on the compiled program."""
    digest = hashlib.sha256()
    for file in sorted(Path(jaxdiff.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
