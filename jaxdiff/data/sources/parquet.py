"""Captioned images in Parquet files, in the Hugging Face layout."""

import bisect
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Natural
from jaxdiff.data.bad_records import NO_IMAGE, NO_REFERENCE, NOT_TEXT, LeftOut, RecordError
from jaxdiff.data.files import DataFiles, data_files
from jaxdiff.data.sources.base import PickledFields, Record
from jaxdiff.data.sources.captions import texts_of
from jaxdiff.data.sources.columns import check_column
from jaxdiff.errors import UserError
from jaxdiff.io.terminal import printable


@checked
@dataclass(frozen=True, kw_only=True)
class Parquet(PickledFields):
    """The rows of the Parquet file, glob or folder `path` (local or `gs://`).

    Column `image` is a struct of `bytes` (an encoded file) and `path`, or plain bytes; column
    `caption` is a string or a list of strings, in any of Arrow's encodings of these; column
    `reference`, if set, is like `image`, or a list of such, or null.

    Rows are read in whole row groups, the unit that Parquet decodes. Each process caches up to
    `cache_mb` megabytes of them. Shuffled reading is fast if a host's part of the data fits;
    otherwise nearly every image re-reads a row group: write small ones, or use ArrayRecord.
    """

    path: str
    image: str = "image"
    caption: str = "text"
    cache_mb: Natural = 512
    reference: str | None = None

    def __len__(self) -> int:
        return self._row_groups.starts[-1]

    def __getitem__(self, index: int, /) -> Record:
        group, row = self._row_groups.locate(index)
        name = self._row_groups.name(group, row)
        try:
            table = self._row_groups.read(group)
            image, caption, *values = (table.column(c)[row].as_py() for c in self._columns)
        except UnicodeDecodeError as error:
            raise RecordError(f"its caption is not UTF-8 ({error})", NOT_TEXT, name) from error
        except (OSError, pa.ArrowException) as error:
            raise RecordError(str(error), name=name) from error
        data = _bytes(image, "its image", NO_IMAGE, name)
        named = values[0] if values and isinstance(values[0], list) else values
        references = [
            _bytes(x, "its reference image", NO_REFERENCE, name) for x in named if x is not None
        ]
        captions = texts_of(caption)
        return {"image": data, "captions": captions, "name": name, "references": references}

    def check(self) -> None:
        """Raise `UserError` for missing files, missing columns, or no rows."""
        if len(self) == 0:
            raise UserError(f"The Parquet files at {self.path} contain no rows: expected images.")

    @property
    def left_out(self) -> LeftOut:
        """The files in the folder that are not Parquet."""
        return self._files.left_out

    @cached_property
    def _files(self) -> DataFiles:
        return data_files(self.path, lambda name: name.lower().endswith(".parquet"), "Parquet file")

    @cached_property
    def _row_groups(self) -> "_RowGroups":
        opened = [(file, _metadata(file)) for file in self._files.files]
        for file, metadata in opened:
            self._check_schema(file, metadata.schema.to_arrow_schema())
        return _RowGroups(opened, self._columns, self.cache_mb * 1_000_000)

    @property
    def _columns(self) -> list[str]:
        reference = [] if self.reference is None else [self.reference]
        return [self.image, self.caption, *reference]

    def _check_schema(self, file: epath.Path, schema: pa.Schema) -> None:
        for key, name in zip(("image", "caption", "reference"), self._columns, strict=False):
            check_column(name, schema.names, key=key, where=str(file))
            if schema.names.count(name) > 1:
                raise UserError(
                    f"{file} has {schema.names.count(name)} columns {name!r}: expected one; rename "
                    f"the others, or set data.source.{key} to another column."
                )
        image, caption = schema.field(self.image).type, schema.field(self.caption).type
        self._check_images(file, "image", self.image, image)
        if self.reference is not None:
            reference = schema.field(self.reference).type
            single = reference.value_type if any(t(reference) for t in _LISTS) else reference
            self._check_images(file, "reference", self.reference, single)
        text = _values(caption.value_type if any(t(caption) for t in _LISTS) else caption)
        if not any(test(text) for test in _TEXTS):
            raise UserError(
                f"Column {self.caption!r} of {file} has type {caption}: "
                "data.source.caption must name a column of text."
            )

    def _check_images(self, file: epath.Path, key: str, name: str, column: pa.DataType) -> None:
        if pa.types.is_struct(column) and column.get_field_index("bytes") >= 0:
            column = column.field("bytes").type
        if not any(test(_values(column)) for test in _BYTES):
            raise UserError(
                f"Column {name!r} of {file} has type {column}: "
                f"data.source.{key} must name a column of encoded images."
            )


def _bytes(image: Any, what: str, kind: str, name: str) -> bytes:
    """Return an encoded image of a row: the bytes, or those of a struct."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if data is None:
        path = image.get("path") if isinstance(image, dict) else None
        where = f", only the path {printable(str(path))}" if path else ""
        raise RecordError(f"{what} has no bytes{where}", kind, name)
    return data


# Arrow's encodings of bytes, of text (all null among them) and of lists.
_BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)
_TEXTS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_null,
)
_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def _values(encoded: pa.DataType) -> pa.DataType:
    """Return the type of the values, also of a dictionary, which holds each once."""
    return encoded.value_type if pa.types.is_dictionary(encoded) else encoded


def _metadata(file: epath.Path) -> pq.FileMetaData:
    try:
        with file.open("rb") as opened:
            return pq.read_metadata(opened)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{file} cannot be read as Parquet ({error}): "
            "data.source.path must select Parquet files only."
        ) from error


class _RowGroups:
    """The row groups of all files, with a cache of the most recently read ones."""

    def __init__(
        self, files: list[tuple[epath.Path, pq.FileMetaData]], columns: list[str], cache_bytes: int
    ):
        self._files = files
        self._names = [str(file) for file, _ in files]
        self._columns = columns
        self._cache_bytes = cache_bytes
        self._groups = [(f, g) for f, (_, m) in enumerate(files) for g in range(m.num_row_groups)]
        self.starts = [0]  # index of each group's first row; last, the number of rows
        for f, g in self._groups:
            self.starts.append(self.starts[-1] + files[f][1].row_group(g).num_rows)
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def locate(self, index: int) -> tuple[int, int]:
        """Return the group of row `index`, and the row's index in the group."""
        if not 0 <= index < self.starts[-1]:
            raise IndexError(index)
        group = bisect.bisect_right(self.starts, index) - 1
        return group, index - self.starts[group]

    def name(self, group: int, row: int) -> str:
        """Return a row's file, and its index in the file."""
        f, g = self._groups[group]
        return f"{self._names[f]} row {self.starts[group] - self.starts[group - g] + row}"

    def read(self, group: int) -> pa.Table:
        """Read the image and caption columns of one group."""
        with self._lock:  # concurrent requests for a group read it once
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            f, g = self._groups[group]
            path, metadata = self._files[f]
            with path.open("rb") as opened:
                file = pq.ParquetFile(opened, metadata=metadata)
                table = file.read_row_group(g, columns=self._columns, use_threads=False)
            self._cache[group] = table
            self._cached_bytes += table.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
            return table
