"""Captioned images in ArrayRecord files: fast random access to data of any size.

One record is, in this order,

    4 bytes         `JDR1`, the format's signature
    4 bytes         n, the length of the header, an unsigned little-endian integer
    n bytes         the header: JSON in UTF-8, {"name": "...", "captions": ["...", ...]}, and
                    "references", the sizes of reference images in bytes, if there are any
    the rest        the image: an encoded file (PNG, JPEG, WebP ...), byte for byte; then the
                    reference images

Every record is its own group (`group_size:1`), so that reading one decodes only that one. Image
files are already compressed, so records are not (`uncompressed`); ArrayRecord adds checksums.
"""

import io
import itertools
import json
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image

from jaxdiff.config.checked import checked
from jaxdiff.data.bad_records import UNLISTED, LeftOut, RecordError
from jaxdiff.data.files import DataFiles, Inventory, data_files, list_files
from jaxdiff.data.shards import EMPTY, MANIFEST, ShardManifest, check_shards, read_manifest
from jaxdiff.data.sources.base import Record, images_of
from jaxdiff.errors import UserError
from jaxdiff.io.files import is_local, partial_path
from jaxdiff.io.text import parse_json

IMAGES, LATENTS = b"JDR1", b"JDL1"
"""Signatures of records of images and of cached latents."""
_LENGTH = struct.Struct("<I")
_START = len(IMAGES) + _LENGTH.size
# Exceptions of reading and decoding a damaged or foreign record.
UNREADABLE = (ValueError, KeyError, TypeError, RuntimeError, OSError)

R = TypeVar("R")


class RecordFiles(Generic[R]):
    """Random access to the records of the ArrayRecord files at `path`, which `_decode` decodes."""

    path: str

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int, /) -> R:
        try:
            return self._decode(self._reader[index])
        except UNREADABLE as error:
            raise RecordError(str(error), name=f"{self.path} record {index}") from error

    def _decode(self, data: bytes) -> R:
        raise NotImplementedError

    @property
    def left_out(self) -> LeftOut:
        """The files in the folder that are no shards of it."""
        return self._files.left_out

    @cached_property
    def _reader(self) -> ArrayRecordDataSource:
        return open_records(self.path, self._files.files, self._manifest)

    @cached_property
    def _manifest(self) -> ShardManifest | None:
        return read_manifest(epath.Path(self.path))

    @cached_property
    def _files(self) -> DataFiles:
        return record_files(self.path, self._manifest)


@checked
@dataclass(frozen=True, kw_only=True)
class ArrayRecord(RecordFiles[Record]):
    """Records written by `jaxdiff prepare`, from the file, glob or folder `path`.

    A folder with a manifest consists of its shards, and all must exist. Any other folder consists
    of the files with `.array_record` or `.arrayrecord` in their name, sorted.
    """

    path: str

    def _decode(self, data: bytes) -> Record:
        return decode_record(data)

    def check(self) -> None:
        """Raise `UserError` for missing, empty or foreign files."""
        manifest = checked_manifest(self.path)
        if manifest is not None and manifest.latents is not None:
            raise UserError(
                f"{self.path} contains cached latents, not images: read it with CachedLatents as "
                "data.source."
            )
        if len(self) == 0:
            raise UserError(f"The ArrayRecord files at {self.path} are empty: expected images.")
        try:
            decode_record(self._reader[0])
        except UNREADABLE as error:
            raise UserError(
                f"The ArrayRecord files at {self.path} contain no captioned images ({error}): "
                "expected files written by jaxdiff; read a TensorFlow data set with TFDS."
            ) from error


class _Instruction(NamedTuple):
    """A file with a known number of records, which need not be opened to count them."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def checked_manifest(path: str) -> ShardManifest | None:
    """Read the manifest of a folder and check its shards; None where there is no manifest.

    Raises:
      UserError: shards are missing or truncated, or the manifest cannot be read.
    """
    folder = epath.Path(path)
    manifest = read_manifest(folder)
    if manifest is not None:
        check_shards(folder, manifest)
    return manifest


def record_files(path: str, manifest: ShardManifest | None) -> DataFiles:
    """Return the ArrayRecord files at `path`: those of the manifest, if there is one.

    Raises:
      UserError: there are none.
    """
    if manifest is None:
        return data_files(path, _is_array_record, "ArrayRecord file")
    folder = epath.Path(path)
    names = [shard.file for shard in manifest.shards]
    inventory = Inventory(list_files(folder), folder)
    inventory.claim(*names, MANIFEST, EMPTY)
    for name in inventory.remaining():
        if _is_array_record(name):
            inventory.reject(name, f"{MANIFEST} does not list it", UNLISTED)
    return DataFiles([folder / name for name in names], inventory.left_out())


def open_records(
    path: str, files: Sequence[epath.Path], manifest: ShardManifest | None
) -> ArrayRecordDataSource:
    """Open the encoded records of files, which may have a manifest.

    Raises:
      UserError: there are files of another kind.
    """
    opened: list[Any] = [str(file) for file in files]
    if manifest is not None:
        opened = [
            _Instruction(file, 0, shard.records, shard.records)
            for file, shard in zip(opened, manifest.shards, strict=True)
            if shard.records
        ]
    try:
        return ArrayRecordDataSource(opened)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be read as ArrayRecord ({error}): "
            "data.source.path must select ArrayRecord files only."
        ) from error


def _is_array_record(name: str) -> bool:
    return any(sign in name for sign in (".array_record", ".arrayrecord"))


def encode_record(record: Record) -> bytes:
    """Encode a record; pixels, uint8 [h, w, 3], become PNG."""
    files = [_png(x) if isinstance(x, np.ndarray) else x for x in images_of(record)]
    header: dict[str, Any] = {"name": record["name"], "captions": record["captions"]}
    if len(files) > 1:
        header["references"] = [len(file) for file in files[1:]]
    return pack(IMAGES, header, b"".join(files))


def _png(pixels: np.ndarray) -> bytes:
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return png.getvalue()


def decode_record(data: bytes) -> Record:
    """Decode a record; its images stay encoded files.

    Raises `ValueError`, `KeyError` or `TypeError` for bytes in another encoding.
    """
    header, payload = unpack(IMAGES, data)
    sizes = header.get("references", [])
    ends = list(itertools.accumulate(sizes, initial=len(payload) - sum(sizes)))
    if not 0 <= ends[0] <= len(payload) or any(size < 0 for size in sizes):
        raise ValueError(f"{len(payload)} bytes are not those of its images")
    image, captions = payload[: ends[0]], header["captions"]
    record: Record = {"image": image, "captions": captions, "name": header["name"]}
    if sizes:
        record["references"] = [payload[a:b] for a, b in itertools.pairwise(ends)]
    return record


def pack(magic: bytes, header: dict[str, Any], payload: bytes) -> bytes:
    """Encode one record."""
    text = json.dumps(header).encode()
    return magic + _LENGTH.pack(len(text)) + text + payload


def unpack(magic: bytes, data: bytes) -> tuple[dict[str, Any], bytes]:
    """Decode header and payload; raises `ValueError` or `TypeError` for another encoding."""
    if data[: len(magic)] != magic or len(data) < _START:
        raise ValueError("its records have another encoding")
    end = _START + _LENGTH.unpack_from(data, len(magic))[0]
    try:
        header = parse_json(data[_START:end], "its header")
    except UserError as error:
        raise ValueError(str(error)) from error
    captions = header["captions"]
    texts = [header["name"], *captions] if isinstance(captions, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its header has no name or no captions")
    return header, data[end:]


def write_array_record(path: str, records: Iterable[Record]) -> int:
    """Write `records` atomically to one ArrayRecord file and return their number.

    An exception leaves no partial file.

    Raises:
      UserError: the file cannot be written.
    """
    return write_encoded(path, (encode_record(record) for record in records))


def write_encoded(path: str, records: Iterable[bytes]) -> int:
    """Write encoded records as `write_array_record` does."""
    target = epath.Path(path)
    name = partial_path(target).name
    remote = not is_local(path)  # the writer supports local files only
    with tempfile.TemporaryDirectory() if remote else nullcontext(str(target.parent)) as folder:
        partial = epath.Path(folder) / name
        writer, count = None, 0
        try:
            with _writing(target):
                writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
            for data in records:
                with _writing(target):
                    writer.write(data)
                count += 1
            with _writing(target):
                writer.close()
                if remote:
                    partial.copy(target, overwrite=True)  # appears once complete
                else:
                    partial.replace(target)
        finally:
            if writer is not None and writer.is_open():
                with suppress(OSError, RuntimeError):
                    writer.close()
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    return count


@contextmanager
def _writing(target: epath.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # the writer raises RuntimeError on a full disk
        raise UserError(
            f"{target} cannot be written ({error}): free some space, or write to another folder."
        ) from error
