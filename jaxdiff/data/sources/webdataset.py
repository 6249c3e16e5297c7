"""Captioned images in tar files, in the WebDataset format."""

import io
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import IO, NamedTuple

from etils import epath

from jaxdiff.config.checked import checked
from jaxdiff.data.bad_records import (
    NO_CAPTION,
    NO_FILE,
    NO_IMAGE,
    NO_REFERENCE,
    REPEATED,
    UNREADABLE,
    LeftOut,
    RecordError,
    Reject,
    some,
)
from jaxdiff.data.files import (
    DataFiles,
    Inventory,
    Listing,
    data_files,
    is_image,
    is_unsupported_image,
)
from jaxdiff.data.sources.base import Record
from jaxdiff.data.sources.captions import captions_in
from jaxdiff.errors import UserError
from jaxdiff.io.files import reason
from jaxdiff.io.terminal import printable

_TEXTS = (".txt", ".json")  # the first one that a sample has
_CHUNK = 2**20


class _Member(NamedTuple):
    """A file in its archive: its position, the file that it links to, or why it is unusable."""

    name: str
    start: int = 0
    size: int = 0
    link: str | None = None
    problem: str = ""


class _Sample(NamedTuple):
    tar: int
    image: _Member
    text: _Member
    references: list[_Member]


class _Index(NamedTuple):
    samples: list[_Sample]
    left_out: LeftOut


@checked
@dataclass(frozen=True, kw_only=True)
class WebDataset:
    """The samples of the tar file, glob or folder `path` (local or `gs://`).

    Files belong to one sample if their names are equal up to the first dot. A sample is an image
    and a `.txt` file with one caption per non-empty line, or a `.json` file with a caption or a
    list of captions under the key `caption`. An image whose name has more dots, `a.v2.png`, is a
    sample of its own if its caption has the same name, `a.v2.txt`; otherwise it is a further file
    of the sample `a`, such as a mask. With `reference="control"`, `a.control.png`, or
    `a.control.0.png` and so on, are the reference images of `a`.

    What else is in the archives is left out (`left_out`): images without a caption and captions
    without an image, by name; further files of a sample and hidden ones, by number. Links are
    followed inside the archive. Headers are read once to index the archives; records are read in
    place, without unpacking. For runs on many hosts, convert to ArrayRecord first.
    """

    path: str
    caption: str = "caption"
    reference: str | None = None

    def __len__(self) -> int:
        return len(self._index.samples)

    def __getitem__(self, index: int, /) -> Record:
        sample = self._index.samples[index]
        tar = self._files.files[sample.tar]
        name = printable(f"{tar}/{sample.image.name}")
        try:
            with tar.open("rb") as file:
                image, text, *references = (
                    _read(file, member)
                    for member in (sample.image, sample.text, *sample.references)
                )
            key = self.caption if sample.text.name.lower().endswith(".json") else None
            captions = captions_in(text, printable(sample.text.name), key)
        except OSError as error:
            raise RecordError(f"{tar} cannot be read ({reason(error)})", name=name) from error
        except RecordError as error:
            raise error.of(name) from error
        return {"image": image, "captions": captions, "name": name, "references": references}

    def identity(self, index: int) -> str:
        """Return the path of the image in its archive, after the name of that."""
        sample = self._index.samples[index]
        return f"{self._files.files[sample.tar].name}/{sample.image.name}"

    def check(self) -> None:
        """Raise `UserError` if the tar files are missing, damaged, or without captioned images."""
        if not self._index.samples:
            rejects = self.left_out.rejects
            raise UserError(
                f"The tar files at {self.path} contain no captioned images"
                f"{f' ({some(rejects)})' if rejects else ''}: expected files such as 0001.jpg "
                "together with 0001.txt or 0001.json."
            )

    @property
    def left_out(self) -> LeftOut:
        """The files in the archives and in their folder that are no records."""
        return self._index.left_out

    @cached_property
    def _files(self) -> DataFiles:
        return data_files(self.path, lambda name: name.lower().endswith(".tar"), "tar file")

    @cached_property
    def _index(self) -> _Index:
        samples, left_out = [], self._files.left_out
        for number, tar in enumerate(self._files.files):
            found = _index_tar(number, tar, self.reference)
            samples += found.samples
            left_out += found.left_out
        return _Index(samples, left_out)


def _read(file: IO[bytes], member: _Member) -> bytes:
    file.seek(member.start)
    return file.read(member.size)


def _members(tar: epath.Path) -> tuple[dict[str, _Member], list[Reject]]:
    """Return the files of an archive by name, and what is wrong with it."""
    members: dict[str, _Member] = {}
    problems: list[Reject] = []

    def reject(name: str, why: str, kind: str) -> None:
        full = printable(f"{tar}/{name}" if name else str(tar))
        problems.append(Reject(name=full, reason=why, kind=kind))

    try:
        with tar.open("rb") as file:
            for header in _headers(file):
                name = _inside(header.name, tar)
                if header.isdir() or "/." in f"/{name}":
                    continue
                if name in members and is_image(name):
                    reject(name, "the archive has a later file of this name", REPEATED)
                members[name] = _member(name, header)
            if _is_cut_off(file):
                reject("", "the archive has no end: it may be cut off", UNREADABLE)
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UserError(
            f"{tar} cannot be read as a tar file ({error}): data.source.path must select complete, "
            "uncompressed tar files only."
        ) from error
    if not members:
        reject("", "the archive is empty", NO_FILE)
    return members, problems


def _index_tar(number: int, tar: epath.Path, reference: str | None) -> _Index:
    """Return the samples of a tar file, in the order of their keys' first members."""
    members, problems = _members(tar)
    inventory = Inventory(Listing(list(members), LeftOut(rejects=problems)), tar)
    groups: dict[str, dict[str, dict[str, str]]] = {}
    references: dict[str, list[str]] = {}
    files = {name: _followed(member, members) for name, member in members.items()}
    for name, member in files.items():
        key, middle, suffix = _split(name)
        if is_image(name) and middle.split(".")[1:2] == [reference]:
            references.setdefault(key, []).append(name)
            continue
        same = groups.setdefault(key, {}).setdefault(middle, {})
        if member.problem and is_image(name):
            inventory.reject(name, member.problem, NO_FILE)
        elif suffix in same and is_image(name):
            inventory.reject(name, "its sample has another image", REPEATED)
        elif not member.problem:
            same.setdefault(suffix, name)
    pairs = [pair for group in groups.values() for pair in _pairs(group, inventory)]
    for key, names in references.items():
        inventory.claim(*names)
        if key not in groups:
            inventory.reject(names[0], "its sample has no image", NO_IMAGE)
    samples = []
    for image, text in pairs:
        key, middle, _ = _split(image)
        names = [] if middle else references.get(key, [])
        found = [files[name] for name in sorted(names, key=lambda name: (len(name), name))]
        broken = [member for member in found if member.problem]
        if broken:
            why = f"its reference image {printable(broken[0].name)}: {broken[0].problem}"
            inventory.reject(image, why, NO_REFERENCE)
        else:
            samples.append(_Sample(number, files[image], files[text], found))
    return _Index(samples, inventory.left_out())


def _pairs(group: dict[str, dict[str, str]], inventory: Inventory) -> Iterator[tuple[str, str]]:
    """Yield the names of images and captions of the files of one key.

    They are grouped by the dotted middle of their names, '' for plain ones, and by suffix.
    """
    plain = any(map(is_image, group.get("", {}).values()))
    for middle, files in group.items():
        images = [name for name in files.values() if is_image(name)]
        texts = [files[suffix] for suffix in _TEXTS if suffix in files]
        if plain and middle and not (images and ".txt" in files):
            inventory.ignore(*files.values())
        elif images and texts:
            yield images[0], texts[0]
            inventory.claim(images[0], texts[0])
            for image in images[1:]:
                inventory.reject(image, "its sample has another image", REPEATED)
            inventory.ignore(*files.values())
        elif images:
            for image in images:
                why = "it has no .txt or .json file with a caption"
                inventory.reject(image, why, NO_CAPTION)
        elif any(map(is_unsupported_image, files.values())):
            inventory.claim(*texts)  # the image is rejected with the files that are left
        elif texts:
            inventory.reject(texts[0], "its sample has no image", NO_IMAGE)


def _split(name: str) -> tuple[str, str, str]:
    """Split a name into key, middle and suffix: 'd/a', '.v2' and '.png' of 'd/a.v2.PNG'."""
    folder, file = posixpath.split(name)
    stem, dot, rest = file.partition(".")
    middle, last, suffix = (dot + rest).rpartition(".")
    return posixpath.join(folder, stem), middle, last + suffix.lower()


def _headers(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of an archive, and of others that are appended to it.

    Raises `tarfile.TarError` for a damaged header, which `tarfile` takes for the end.
    """
    start: int | None = 0
    while start is not None:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for header in archive:
                if header.size < 0:
                    raise tarfile.ReadError(f"the size of {header.name!r} is negative")
                yield header
            if start and archive.offset == start:
                raise tarfile.ReadError(f"it is damaged at byte {start}")
            start = _next_block(file, archive.offset)


def _next_block(file: IO[bytes], start: int) -> int | None:
    """Return the position of the next block of 512 bytes, from `start`, that is not zeros."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            return start + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        start += len(chunk)
    return None


def _is_cut_off(file: IO[bytes]) -> bool:
    """Whether a file does not end with a block of zeros, as complete archives do."""
    file.seek(-tarfile.BLOCKSIZE, io.SEEK_END)
    return any(file.read())


def _member(name: str, header: tarfile.TarInfo) -> _Member:
    if header.islnk():
        return _Member(name, link=posixpath.normpath(header.linkname))
    if header.issym():
        target = posixpath.join(posixpath.dirname(name), header.linkname)
        return _Member(name, link=posixpath.normpath(target))
    if not header.isfile():
        return _Member(name, problem="it is a pipe or a device")
    if header.sparse is not None:
        return _Member(name, problem="it is stored as a sparse file")
    return _Member(name, header.offset_data, header.size)


def _followed(member: _Member, members: dict[str, _Member]) -> _Member:
    """Return a member at the position of the file that it links to."""
    if member.link is None:
        return member
    name, seen = member.name, set()
    while member.link is not None:
        seen.add(member.name)
        target = members.get(member.link)
        if target is None or target.name in seen:
            return _Member(name, problem="it links to no file in the archive")
        member = target
    return member._replace(name=name)


def _inside(name: str, tar: epath.Path) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{tar} contains {name!r}, a path outside the archive: expected relative paths "
            "without '..'; do not use this file."
        )
    return str(path)
