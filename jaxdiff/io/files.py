"""Atomic writes, and checks of local and remote paths."""

import contextlib
from importlib.util import find_spec

from etils import epath

from jaxdiff.errors import UserError


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is in the local file system, not in object storage such as `gs://`."""
    return "://" not in str(path)


def check_reachable(path: str) -> None:
    """Check that a folder in object storage can be accessed.

    Raises:
      UserError: a package is missing, the bucket does not exist, or the user is not signed in.
    """
    if find_spec("gcsfs") is None:
        raise UserError(
            "gs:// needs the package gcsfs, which is not installed: run pip install -e '.[gcs]' in "
            "a clone of jaxdiff."
        )
    try:
        epath.Path(path).exists()
    except Exception as error:  # the storage clients' exceptions share no base class
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{path} cannot be reached ({reason}): check the bucket's name, and sign in with "
            "`gcloud auth application-default login`."
        ) from error


def read_bytes(path: epath.PathLike, wanted: str, *, largest: int | None = None) -> bytes:
    """Read a file.

    Args:
      path: local or remote.
      wanted: what the message asks for, such as "the path of an image".
      largest: bytes that a file may have; None for any number.

    Raises:
      UserError: it cannot be read, or is larger.
    """
    try:
        with epath.Path(path).open("rb") as file:
            data = file.read() if largest is None else file.read(largest + 1)
    except (OSError, ValueError) as error:  # ValueError: an impossible path
        raise UserError(f"{path} cannot be read ({reason(error)}): give {wanted}.") from error
    if largest is not None and len(data) > largest:
        raise UserError(f"{path} has more than {largest} bytes: give {wanted}.")
    return data


def reason(error: Exception) -> str:
    """Return why the system refused a file, without its number and path."""
    return str(getattr(error, "strerror", None) or error)


def write_whole(path: epath.Path, data: bytes) -> None:
    """Write a file atomically: under a temporary name, then rename it. Creates its folder.

    Objects in remote storage appear only once complete, so they are written directly.
    """
    if not is_local(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except BaseException:  # a full disk, or Ctrl-C: leave no partial file
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def partial_path(path: epath.Path) -> epath.Path:
    """Return the temporary name of a file; a killed process may leave such a file behind."""
    return path.parent / f".partial-{path.name}"
