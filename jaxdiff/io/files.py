"""Atomic writes, and checks of local and remote paths."""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from etils import epath

from jaxdiff.errors import UserError

_PARTIAL = re.compile(r"\.partial-[0-9]+-[0-9a-f]{16}")


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is in the local file system, not in object storage such as `gs://`."""
    return "://" not in str(path)


def check_address(path: str) -> None:
    """Check that a path is local or in a bucket.

    Raises:
      UserError: it is another address, such as http://.
    """
    if not is_local(path) and not path.startswith("gs://"):
        raise UserError(
            f"{path} is an address that jaxdiff does not read or write: expected the path of a "
            "file or folder, or gs://; download it."
        )


def check_reachable(path: str) -> None:
    """Check that a folder in object storage can be accessed.

    Raises:
      UserError: it is no bucket, a package is missing, the bucket does not exist, or the user is
        not signed in.
    """
    check_address(path)
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

    Raises:
      UserError: it cannot be written, as on a full disk; nothing is left of it.
    """
    if not is_local(path):
        path.write_bytes(data)
        return
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError | ValueError):
            raise
        raise UserError(
            f"{path} cannot be written ({reason(error)}): make room or write access there, or "
            "choose another folder."
        ) from error


def partial_path(path: epath.Path) -> epath.Path:
    """Return the temporary name of a file, which is this process's own, and short.

    A killed process leaves such a file behind; `remove_partial` removes it.
    """
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return path.parent / f".partial-{os.getpid()}-{digest}"


def remove_partial(folder: epath.PathLike) -> None:
    """Remove the temporary files of killed processes below a local folder."""
    for path in Path(folder).rglob(".partial-*"):
        if _PARTIAL.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def make_folder(folder: epath.PathLike) -> epath.Path:
    """Create an output folder unless it exists, and check that files can be written to it.

    Raises:
      UserError: a file has its name, or it is not writable, or full.
    """
    path = epath.Path(folder)
    if not is_local(path):
        path.mkdir(parents=True, exist_ok=True)
        return path
    probe = path / f".probe-{os.getpid()}"
    try:
        if not str(folder).strip():
            raise ValueError("its name is empty")
        path.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} cannot be written to as a folder ({reason(error)}): choose another one, or "
            "make room or write access there."
        ) from error
    return path


_OF_FILES = frozenset(
    {
        *(errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR),
        *(errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG, errno.ENODEV, errno.ENOENT, errno.ENOSPC),
        *(errno.ENOTDIR, errno.ENOTEMPTY, errno.ENXIO, errno.EPERM, errno.EROFS, errno.ESTALE),
    }
)


_OF_WRITING = (errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EROFS)


@contextlib.contextmanager
def file_errors_as_user_errors(folder: epath.PathLike) -> Iterator[None]:
    """Raise a system's refusal of a file in `folder` within the context as `UserError`."""
    try:
        yield
    except OSError as error:
        if (refusal := file_error(error, str(folder))) is None:
            raise
        raise refusal from error


def file_error(error: OSError, otherwise: str = "A file") -> UserError | None:
    """Return a system's refusal of a file as one sentence; None for errors of another kind.

    `otherwise` names what the system does not name.
    """
    if error.errno not in _OF_FILES:
        return None
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    tried = "written to" if error.errno in _OF_WRITING else "read or written"
    return UserError(
        f"{' and '.join(names) or otherwise} cannot be {tried} "
        f"({reason(error)}): check the path, its permissions and the free space, then run the "
        "same command again."
    )
