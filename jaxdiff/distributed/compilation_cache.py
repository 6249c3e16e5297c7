"""A cache of compiled programs on disk, so that only the first run of a kind compiles.

    compiled/          in the user's cache (`io.user_cache`)
      HOST/            instruction set of the CPU
        NAME-KEY       an executable, in JAX's format

JAX's key holds the program, the versions of jaxlib and of the backend, the flags of XLA, and the
kind and topology of the devices; in JAX 0.10 it lacks the instruction set of the host, for which
programs of XLA:CPU and those that run beside an accelerator are compiled. JAX's own files are not
atomic, and its bound on their size needs a lock: here a file is renamed into place, the oldest
files are removed beyond `LARGEST` bytes, and a folder that cannot be written to is one without
new entries. An executable is machine code: a cache that others can write to can run theirs.
"""

import contextlib
import functools
import hashlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.io.files import is_local, write_whole
from jaxdiff.io.user_cache import VARIABLE, user_cache

LARGEST = 2 * 2**30  # bytes of all files
ANY_HOST = "any"

# Names of the folders of hosts, and of the entries in them, which alone are ever removed.
_HOST, _ENTRY = re.compile(r"[0-9a-f]{16}"), re.compile(r".+-[0-9a-f]{64}")
_JAX = "JAX_COMPILATION_CACHE_DIR"
_MIN_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_XLA_CACHES = "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"


def cache_folder(environment: Mapping[str, str] = os.environ) -> epath.Path | None:
    """Return the folder of this host's programs; None if there is no cache, or JAX has its own."""
    folder = None if _JAX in environment else user_cache("compiled", environment)
    return folder and folder / _host()


def use_compilation_cache(environment: Mapping[str, str] = os.environ) -> None:
    """Let JAX read programs from `cache_folder` and write to it; unless it has a cache already.

    Several processes use a folder that the variable gives, which all of them must share, but not
    the user's: JAX writes from process 0 alone, and on GPUs a process that finds its program does
    not take part when the others tune theirs.
    """
    import jax  # not for `jaxdiff --help`

    folder = cache_folder(environment)
    if folder is None or jax.config.values["jax_compilation_cache_dir"] not in (None, str(folder)):
        return
    _install(FolderCache(folder), shared=bool(environment.get(VARIABLE)))


def keep_executables(folder: epath.Path, *, attached: bool) -> None:
    """Let JAX write programs to a folder for `read_executables`, instead of to any cache.

    `attached` is false where they are for other devices, beside which the host does not matter.
    """
    _install(FolderCache(folder / (_host() if attached else ANY_HOST)), shared=True)


def read_executables(folder: epath.Path) -> None:
    """Let JAX read programs from a folder of `keep_executables`, before those of its cache."""
    import jax
    from jax._src import compilation_cache

    opened, folders = compilation_cache.get_file_cache, [folder / _host(), folder / ANY_HOST]

    def open_cache(path: str) -> tuple[_ReadAlso, str]:
        cache = None if path == str(folder) else opened(path)
        return _ReadAlso(folders, cache and cache[0]), path

    compilation_cache.get_file_cache = open_cache  # type: ignore[assignment]
    compilation_cache.reset_cache()
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def trace_settings() -> list[str]:
    """Return JAX's settings that change what is traced, such as the precision of products."""
    from jax._src import config  # not for `jaxdiff --help`

    return [text for text in map(repr, config.trace_context()) if " at 0x" not in text]


def _install(cache: "FolderCache", *, shared: bool) -> None:
    """Make a cache that of JAX; of several processes only if they share it."""
    import jax
    from jax._src import compilation_cache

    def open_cache(path: str) -> tuple[FolderCache, str] | None:
        return None if jax.distributed.is_initialized() and not shared else (cache, path)

    compilation_cache.get_file_cache = open_cache  # type: ignore[assignment]
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(cache._path))
    if _MIN_SECONDS not in os.environ:  # JAX's default skips what compiles in less than a second
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if _XLA_CACHES not in os.environ:  # XLA's files of a GPU's tuning have no bound
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


@functools.cache
def _host() -> str:
    """Return a name of the instruction set of this machine."""
    lines: set[str] = set()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        lines = set(re.findall(r"(?m)^(?:model name|flags|CPU part|Features)\s*:.*$", text))
    text = "\n".join([platform.machine(), platform.processor(), *sorted(lines)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class FolderCache:
    """JAX's `CacheInterface` on a folder; without effect where that cannot be read or written."""

    def __init__(self, folder: epath.Path):
        self._path = folder
        self._free: int | None = None  # bytes up to the bound; None before they are counted

    def get(self, key: str) -> bytes | None:
        """Return an entry; None if there is none."""
        file = self._path / key
        try:
            data = file.read_bytes()
        except OSError:
            return None
        if is_local(file):
            with contextlib.suppress(OSError):
                os.utime(file)  # the time of the last use
        return data

    def put(self, key: str, value: bytes) -> None:
        """Write an entry, and remove old ones beyond the bound."""
        with contextlib.suppress(OSError, UserError):
            if is_local(self._path):
                os.makedirs(self._path, mode=0o700, exist_ok=True)
                if self._free is None or self._free < len(value):
                    self._free = LARGEST - _shrink(self._path.parent, LARGEST - len(value))
                self._free -= len(value)
            if len(value) <= LARGEST:
                write_whole(self._path / key, value)


class _ReadAlso:
    """Folders that are only read, before a cache, if there is one."""

    def __init__(self, folders: Sequence[epath.Path], cache: Any):
        self._path, self._folders, self._cache = folders[0], list(map(FolderCache, folders)), cache

    def get(self, key: str) -> bytes | None:
        readers = [*self._folders, *([self._cache] if self._cache else [])]
        return next((data for one in readers if (data := one.get(key)) is not None), None)

    def put(self, key: str, value: bytes) -> None:
        if self._cache is not None:
            self._cache.put(key, value)


def _shrink(base: epath.Path, most: int) -> int:
    """Remove the least recently used entries of all hosts beyond `most` bytes; return the rest."""
    entries = []
    for path in base.glob("*/*"):
        if not _HOST.fullmatch(path.parent.name) or not _ENTRY.fullmatch(path.name):
            continue  # a file of the user's
        with contextlib.suppress(OSError):  # removed by another process
            status = os.stat(path)
            entries.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= most:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size
    return total
