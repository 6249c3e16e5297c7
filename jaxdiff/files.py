"""Files that are there whole or not at all."""

from etils import epath


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file under a temporary name, then renames it; makes its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.write_bytes(data)
    partial.replace(path)


def partial_path(path: epath.Path) -> epath.Path:
    """The name under which a file is written, which a process that is killed leaves behind."""
    return path.parent / f".partial-{path.name}"
