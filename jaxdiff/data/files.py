"""Find the files of a data set: a single file, a glob, or a folder searched recursively."""

from collections.abc import Callable, Iterable, Iterator

from etils import epath

from jaxdiff.errors import UserError


def files_below(root: epath.Path) -> Iterator[str]:
    """Yield the names, relative to `root`, of all files in and below it, except hidden ones."""
    for folder, folders, files in root.walk():
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = folder.relative_to(root)
        yield from ((relative / name).as_posix() for name in files if not name.startswith("."))


def data_files(path: str, wanted: Callable[[str], bool], kind: str) -> list[epath.Path]:
    """Return the file at `path`, a glob's matches, or a folder's files for which `wanted(name)`.

    They are sorted; `kind` describes them in the error.

    Raises:
      UserError: there is no such file.
    """
    root = epath.Path(path)
    if root.is_file():
        return [root]
    if root.is_dir():
        files = [root / name for name in files_below(root) if wanted(name)]
        missing = f"the folder {path} contains no {kind}"
    elif any(sign in path for sign in "*?["):
        files = [f for f in _glob(root) if f.is_file()]
        missing = f"no file matches {path}"
    else:
        files = []
        missing = f"{path} does not exist"
    if not files:
        raise UserError(
            f"{missing}: data.source.path must be a {kind}, a glob of them, or a folder of them."
        )
    return sorted(files)


def _glob(pattern: epath.Path) -> Iterable[epath.Path]:
    """Glob below the last folder of `pattern` without wildcards."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    return epath.Path(*parts[:first]).glob("/".join(parts[first:]))
