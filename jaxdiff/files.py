"""Files that are there whole or not at all."""

from etils import epath


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is of a file system, and not of a cloud's storage such as `gs://`."""
    return "://" not in str(path)


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
