"""Files that are there whole or not at all."""

from importlib.util import find_spec

from etils import epath

from jaxdiff.errors import UserError


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is of a file system, and not of a cloud's storage such as `gs://`."""
    return "://" not in str(path)


def check_reachable(path: str) -> None:
    """Finds out before anything is done whether a folder of a cloud's storage can be used.

    Raises:
      UserError: a package is missing, there is no such bucket, or nobody is signed in.
    """
    if find_spec("gcsfs") is None:
        raise UserError("gs:// needs one package more: pip install 'jaxdiff[gcs]'.")
    try:
        epath.Path(path).exists()
    except Exception as error:  # of the storage's client, whose classes have nothing in common
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{path} cannot be reached ({reason}): check the name of the bucket, and sign in by "
            "`gcloud auth application-default login`."
        ) from error


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file under a temporary name, then renames it; makes its folder if there is none.

    An object of a cloud's storage is there only once it is whole, and has no need of that: to
    rename it would be to copy it.
    """
    if not is_local(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.write_bytes(data)
    partial.replace(path)


def partial_path(path: epath.Path) -> epath.Path:
    """The name under which a file is written, which a process that is killed leaves behind."""
    return path.parent / f".partial-{path.name}"
