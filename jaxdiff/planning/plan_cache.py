"""Keep plans, so that a search compiles each of its programs once.

A plan is a small file in `plans` of the user's cache, named by the hash of all that it depends on:
the recipe, the topology and its devices, flags of XLA and libtpu, JAX's settings, the versions of
JAX and libtpu, and this package's code. A plan that depends on other code (`--plugin`) is not kept.
"""

import contextlib
import hashlib
import importlib.metadata
import os
from typing import Any

from etils import epath

from jaxdiff.config.serialization import accepted_types, to_json
from jaxdiff.distributed.compilation_cache import trace_settings
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.io.text import format_json, read_json
from jaxdiff.io.user_cache import package_digest, user_cache
from jaxdiff.planning.topology import Topology
from jaxdiff.training.recipe import Config

MOST = 1000
"""Plans that are kept; the oldest go first."""

_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def plan_file(
    config: Config, topology: Topology, flags: tuple[str, ...], quick: bool
) -> epath.Path | None:
    """Return the file of a plan, there or not; None without a cache, or with other code."""
    folder = user_cache("plans")
    if folder is None or accepted_types():
        return None
    # `local` names other devices on other machines, which may share the cache.
    devices = [len(topology.devices), topology.devices[0].device_kind]
    settings = [*trace_settings(), *(os.environ.get(name) for name in _FLAGS)]
    made_by = [*_versions(), package_digest()]
    key = [to_json(config), topology.name, devices, flags, quick, *settings, *made_by]
    return folder / f"{hashlib.sha256(format_json(key).encode()).hexdigest()}.json"


def read_plan(file: epath.Path | None) -> dict[str, Any] | None:
    """Return a plan that was kept; None if it is not there or damaged."""
    if file is None or not file.exists():
        return None
    with contextlib.suppress(UserError, OSError):
        return read_json(file)
    return None


def keep_plan(file: epath.Path | None, plan: dict[str, Any]) -> None:
    """Write a plan and remove the oldest beyond `MOST`; a full or read-only disk is no error."""
    if file is None:
        return
    with contextlib.suppress(OSError, UserError):
        write_whole(file, format_json(plan).encode())
        kept = sorted(file.parent.glob("?" * 64 + ".json"), key=lambda kept: -kept.stat().mtime)
        for old in kept[MOST:]:
            old.unlink(missing_ok=True)


def _versions() -> list[str]:
    found = []
    for name in ("jax", "jaxlib", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found
