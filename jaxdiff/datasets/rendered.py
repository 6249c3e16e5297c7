"""Vector images, rendered once by resvg into a file of the user's cache."""

import contextlib
import importlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from jaxdiff.errors import UserError
from jaxdiff.io.files import is_local
from jaxdiff.io.user_cache import user_cache


def optional_package(name: str, dataset: str, extra: str) -> Any:
    """Import a package of the extra that a data set needs.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"The data set {dataset} needs the package {error.name}, which is not installed: "
            f"run pip install -e '.[{extra}]' in a clone of jaxdiff."
        ) from error


def image_cache(given: str | None, dataset: str) -> Path:
    """Return the folder for a data set's rendered images: `given`, or one of the user's cache.

    Raises:
      UserError: the user's cache is off or remote.
    """
    if given:
        return Path(given)
    folder = user_cache("images")
    if folder is None or not is_local(folder):
        raise UserError(
            f"The data set {dataset} keeps rendered images in a local cache: expected "
            "JAXDIFF_CACHE to name a local folder; set data.source.cache to one."
        )
    return Path(folder)


@contextlib.contextmanager
def cache_errors(path: Path, dataset: str) -> Iterator[None]:
    """Raise errors of writing or reading a file of the cache within the context as `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The {dataset} cache in {path.parent} cannot be used ({error}): free some space and "
            "check its permissions, or set data.source.cache to another folder."
        ) from error
    except (EOFError, ValueError, SafetensorError) as error:
        if not path.exists():  # of rendering
            raise
        raise UserError(
            f"The {dataset} cache {path} is damaged ({error}): remove it, and the same command "
            "renders it again."
        ) from error


def write_cached(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file of the cache atomically; it creates the folder.

    Concurrent writers write separate, equal files; the last one renamed remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:  # not a memory map, which crashes on a full disk
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
