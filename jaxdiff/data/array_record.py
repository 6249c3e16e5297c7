"""Captioned images in ArrayRecord files: fast random access to data of any size.

One record is, in this order,

    4 bytes         `JDR1`, which tells such a record from any other
    4 bytes         n, the length of the header, an unsigned little-endian integer
    n bytes         the header: JSON in UTF-8, {"name": "...", "captions": ["...", ...]}
    the rest        the image: an encoded file (PNG, JPEG, WebP ...), byte for byte

and every record is a group of its own (`group_size:1`), so that reading one decodes only it.
"""

import io
import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.files import data_files
from jaxdiff.data.source import Record
from jaxdiff.errors import UserError

_MAGIC = b"JDR1"
_LENGTH = struct.Struct("<I")
_START = len(_MAGIC) + _LENGTH.size


@dataclass(frozen=True, kw_only=True)
class ArrayRecord:
    """The records of the file, glob or folder `path`, as `write_array_record` writes them.

    In a folder, files count whose name contains `.array_record` or `.arrayrecord`, in order
    of name, so shards are read as one.
    """

    path: str

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int, /) -> Record:
        try:
            return decode_record(self._reader[index])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise RecordError(f"{self.path} record {index}: {error}") from error

    def check(self) -> None:
        """Raises `UserError` for missing, empty or foreign files."""
        if len(self) == 0:
            raise UserError(f"The ArrayRecord files at {self.path} are empty: expected images.")
        try:
            decode_record(self._reader[0])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"The ArrayRecord files at {self.path} hold no captioned images ({error}): "
                "expected files written by jaxdiff; a TensorFlow data set is read by TFDS."
            ) from error

    @cached_property
    def _reader(self) -> ArrayRecordDataSource:
        files = data_files(self.path, _is_array_record, "ArrayRecord file")
        try:
            return ArrayRecordDataSource([str(file) for file in files])
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"{self.path} cannot be read as ArrayRecord ({error}): "
                "data.source.path must lead to ArrayRecord files alone."
            ) from error


def _is_array_record(name: str) -> bool:
    return any(sign in name for sign in (".array_record", ".arrayrecord"))


def encode_record(record: Record) -> bytes:
    """`record` in the encoding above; pixels uint8 [h, w, 3] are stored losslessly, as PNG."""
    image = record["image"]
    if isinstance(image, np.ndarray):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        image = png.getvalue()
    header = json.dumps({"name": record["name"], "captions": record["captions"]}).encode()
    return _MAGIC + _LENGTH.pack(len(header)) + header + image


def decode_record(data: bytes) -> Record:
    """The inverse of `encode_record`, leaving the image encoded.

    Raises `ValueError`, `KeyError` or `TypeError` for bytes in another encoding.
    """
    if data[: len(_MAGIC)] != _MAGIC or len(data) < _START:
        raise ValueError("its records are in another encoding")
    end = _START + _LENGTH.unpack_from(data, len(_MAGIC))[0]
    header = json.loads(data[_START:end])
    return {"image": data[end:], "captions": header["captions"], "name": header["name"]}


def write_array_record(path: str, records: Iterable[Record]) -> int:
    """Writes `records` to one ArrayRecord file at `path` and returns how many there were.

    The file appears under its name only when it is whole, and nothing of it stays where something
    stops the writing. Raises `UserError` where it cannot be written.
    """
    target = epath.Path(path)
    partial = target.parent / f".partial-{target.name}"
    writer, count = None, 0
    try:
        with _writing(target):
            writer = ArrayRecordWriter(str(partial), "group_size:1")
        for record in records:
            data = encode_record(record)
            with _writing(target):
                writer.write(data)
            count += 1
        with _writing(target):
            writer.close()
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
            f"{target} cannot be written ({error}): make room there, or write to another folder."
        ) from error
