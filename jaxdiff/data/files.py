"""Find the files of a data set: a single file, a glob, or a folder searched recursively.

No file is lost: each is claimed by a record, rejected by name, or counted among the others
(`Inventory`). Hidden files and folders, whose names begin with a dot, do not belong to a data set.
"""

import os
import posixpath
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from etils import epath

from jaxdiff.data.bad_records import (
    ELSEWHERE,
    NO_FILE,
    UNREADABLE,
    UNSUPPORTED,
    LeftOut,
    Reject,
)
from jaxdiff.errors import UserError
from jaxdiff.io.files import is_local, reason
from jaxdiff.io.terminal import printable

# fmt: off
_IMAGES = frozenset([
    ".apng", ".avif", ".bmp", ".gif", ".jfif", ".jif", ".jpe", ".jpeg", ".jpg", ".png", ".tif",
    ".tiff", ".webp",
])
_UNSUPPORTED = frozenset([
    ".arw", ".cr2", ".cr3", ".dds", ".dng", ".exr", ".hdr", ".heic", ".heif", ".hif", ".ico",
    ".j2k", ".jp2", ".jpx", ".jxl", ".nef", ".orf", ".pbm", ".pcx", ".pgm", ".pnm", ".ppm", ".psd",
    ".raf", ".raw", ".rw2", ".svg", ".tga", ".xcf",
])
# fmt: on
_NO_SUFFIX = "without a suffix"
# Files that contain records of other sources.
_RECORDS = (".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar", ".parquet", ".parq")
_PACKED = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot; '' if it has none."""
    return posixpath.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Whether a file's name has the suffix of an image that can be read."""
    return suffix_of(name) in _IMAGES


def is_unsupported_image(name: str) -> bool:
    """Whether a file's name has the suffix of an image that cannot be read."""
    return suffix_of(name) in _UNSUPPORTED


def is_packed_tar(name: str) -> bool:
    """Whether a file's name is that of a compressed tar file."""
    return name.lower().endswith(_PACKED)


def image_suffixes() -> str:
    """Return the suffixes of images, for a message."""
    return ", ".join(sorted(_IMAGES))


def is_regular(path: epath.Path) -> bool:
    """Whether a path is a file that ends, unlike a pipe or a device."""
    return os.path.isfile(path) if is_local(path) else path.is_file()


class Listing(NamedTuple):
    """The files in and below a folder, relative to it and sorted, and what cannot be listed."""

    files: list[str]
    left_out: LeftOut


def list_files(root: epath.Path) -> Listing:
    """List all files in and below a folder, except hidden ones.

    Links to folders are followed; a folder that several links reach is read once.

    Raises:
      UserError: the folder itself cannot be read.
    """
    if is_local(root):
        return _list_local(os.fspath(root))
    files: list[str] = []
    rejects: list[Reject] = []

    def failed(error: OSError) -> None:
        name = printable(str(error.filename or root))
        rejects.append(Reject(name=name, reason=reason(error), kind=UNREADABLE))

    for folder, folders, names in root.walk(on_error=failed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = folder.relative_to(root)
        files += [(relative / name).as_posix() for name in names if not name.startswith(".")]
    return Listing(sorted(files), LeftOut(rejects=rejects))


def _list_local(root: str) -> Listing:
    files: list[str] = []
    rejects: list[Reject] = []
    others: Counter[str] = Counter()
    folders, links = deque([""]), deque[str]()  # links are followed last
    seen: set[tuple[int, int]] = set()

    def reject(name: str, why: str, kind: str) -> None:
        rejects.append(Reject(name=printable(os.path.join(root, name)), reason=why, kind=kind))

    while folders or links:
        folder = (folders or links).popleft()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                others["links to folders that are read already"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise UserError(
                    f"{root} cannot be read ({reason(error)}): give a folder that can be read."
                ) from error
            reject(folder, f"the folder cannot be read ({reason(error)})", UNREADABLE)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(name)
                elif entry.is_file():
                    files.append(name)
                elif entry.is_symlink():
                    reject(name, "the link leads to no file", NO_FILE)
                else:
                    reject(name, "it is a pipe, a socket or a device", NO_FILE)
            except OSError as error:  # a loop of links
                reject(name, reason(error), UNREADABLE)
    return Listing(sorted(files), LeftOut(rejects=rejects, others=others))


class Inventory:
    """The files of a data set, until each is claimed or rejected; the rest is counted.

    Args:
      listing: of the files.
      root: the folder or the archive, for the names of rejects.
    """

    def __init__(self, listing: Listing, root: object):
        self._left = dict.fromkeys(listing.files)
        self._root = root
        self._unlisted = {reject.name: reject for reject in listing.left_out.rejects}
        self._rejects: list[Reject] = []
        self._others = Counter(listing.left_out.others)

    def remaining(self) -> list[str]:
        """Return the files that are neither claimed nor rejected yet."""
        return list(self._left)

    def claim(self, *names: str) -> None:
        """Take files that belong to a record, used or rejected."""
        for name in names:
            self._left.pop(name, None)

    def ignore(self, *names: str) -> None:
        """Count files that are still left among the others, whatever their suffix."""
        for name in names:
            if self._left.pop(name, 0) is None:
                self._others[suffix_of(name) or _NO_SUFFIX] += 1

    def reject(self, name: str, why: str, kind: str) -> None:
        """Reject one record, and take the file `name`, if there is one."""
        self._left.pop(name, None)
        self._unlisted.pop(self.full(name), None)
        self._rejects.append(Reject(name=self.full(name), reason=why, kind=kind))

    def full(self, name: str) -> str:
        """Return the printable name of a file with its folder."""
        return printable(f"{self._root}/{name}")

    def left_out(self) -> LeftOut:
        """Return the rejects and the number of other files, once all records are known.

        Files that are left and have the suffix of an image, or of files of many, are rejected.
        """
        for name in self.remaining():
            suffix = suffix_of(name)
            if is_unsupported_image(name):
                self.reject(name, f"the format {suffix} is not supported", UNSUPPORTED)
            elif is_packed_tar(name):
                self.reject(name, "it is compressed: expected an uncompressed .tar", UNSUPPORTED)
            elif is_image(name) or name.lower().endswith(_RECORDS) or ".array_record" in name:
                self.reject(name, "data.source reads files of another kind", ELSEWHERE)
        self._others.update(suffix_of(name) or _NO_SUFFIX for name in self._left)
        self._left.clear()
        rejects = (*self._unlisted.values(), *self._rejects)
        return LeftOut(rejects=rejects, others=dict(self._others))


class DataFiles(NamedTuple):
    """The files that contain a data set, sorted, and what else is in their folder."""

    files: list[epath.Path]
    left_out: LeftOut


def data_files(path: str, wanted: Callable[[str], bool], kind: str) -> DataFiles:
    """Return the file at `path`, a glob's matches, or a folder's files for which `wanted(name)`.

    `kind` describes them in the error.

    Raises:
      UserError: there is no such file.
    """
    root = epath.Path(path)
    if is_regular(root):
        return DataFiles([root], LeftOut())
    left_out = LeftOut()
    if root.is_dir():
        listing = list_files(root)
        names = [name for name in listing.files if wanted(name)]
        inventory = Inventory(listing, root)
        inventory.claim(*names)
        left_out = inventory.left_out()
        files = sorted(root / name for name in names)
        missing = f"the folder {path} contains no {kind}"
    elif any(sign in path for sign in "*?["):
        matches = {f: is_regular(f) for f in sorted(_glob(root))}
        files = [f for f, is_file in matches.items() if is_file]
        rejects = [
            Reject(name=printable(str(f)), reason="it is not a file", kind=NO_FILE)
            for f, is_file in matches.items()
            if not is_file
        ]
        left_out = LeftOut(rejects=rejects)
        missing = f"no file matches {path}"
    else:
        files = []
        missing = f"{path} is not a file" if root.exists() else f"{path} does not exist"
    if not files:
        raise UserError(
            f"{missing}: data.source.path must be a {kind}, a glob of them, or a folder of them."
        )
    return DataFiles(files, left_out)


def _glob(pattern: epath.Path) -> Iterable[epath.Path]:
    """Glob below the last folder of `pattern` without wildcards."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    return epath.Path(*parts[:first]).glob("/".join(parts[first:]))
