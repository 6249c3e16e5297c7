"""The interface of a data set: random access to records."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Int32


class Record(TypedDict):
    """One captioned image: uint8 pixels [h, w, 3] or an encoded file, its captions, its name.

    `references`, if there are any, are the images that the captions describe how to edit.
    """

    image: np.ndarray | bytes
    captions: list[str]
    name: str
    references: NotRequired[Sequence[np.ndarray | bytes]]


def images_of(record: Record) -> list[np.ndarray | bytes]:
    """Return the image of a record and its references."""
    return [record["image"], *record.get("references", [])]


class LatentRecord(TypedDict):
    """The latents of one captioned image, in v views.

    `moments`, float [v, h, w, 2 c], are means of z and logarithms of its variance, or means alone,
    [v, h, w, c]; `size_crop` is as in `jaxdiff.data.transforms.Example`; `text`, if cached, float
    [k, m], are the features of k captions from `Conditioner.pack`; `digest` is that of the image
    (`digest_of`), in hex, None where an earlier version wrote the record; `references`, if there
    are any, are the moments of reference images, in v views too.
    """

    moments: np.ndarray
    text: np.ndarray | None
    size_crop: Int32[np.ndarray, "v 6"]
    captions: list[str]
    name: str
    digest: str | None
    references: NotRequired[Sequence[np.ndarray]]


@runtime_checkable
class Source(Protocol):
    """Random access to records; constructing one opens no files.

    A source that finds records it cannot use while it indexes its files states them in a property
    `left_out` (`jaxdiff.data.bad_records.LeftOut`); others need none. One that distinguishes its
    records without reading them has a method `identity(index)`, a text that stays the same when
    records are added or change places (`identity_of`).
    """

    def __len__(self) -> int:
        """Return the number of records."""
        ...

    def __getitem__(self, index: int, /) -> Record:
        """Return the record at `index`, the same in every call and process.

        Raises:
          RecordError: this one record cannot be used.
        """
        ...

    def check(self) -> None:
        """Raise `UserError` if the data are missing or empty."""
        ...


def identity_of(source: Any, index: int, record: Record | None = None) -> bytes:
    """Return what distinguishes a record in any order of the data: its identity, or its pixels.

    `record` is the record, if it is read already.

    Raises:
      RecordError: the record must be read for it, and cannot be.
    """
    stated = getattr(source, "identity", None)
    if stated is not None:
        return stated(index).encode(errors="surrogateescape")
    data = (source[index] if record is None else record)["image"]
    return data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()


def digest_of(source: Any, index: int, record: Record | None = None) -> str:
    """Return a digest of the identity of a record, six bytes in hex, by which it may be held out.

    Cached latents have the digest of their image.

    Raises:
      RecordError: as `identity_of`.
    """
    stored = getattr(source, "image_digest", None)
    if stored is not None:
        return stored(index)
    return hashlib.blake2b(identity_of(source, index, record), digest_size=6).hexdigest()


class PickledFields:
    """A dataclass that pickles its fields only: each process opens its own files and caches."""

    def __getstate__(self) -> dict[str, Any]:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        return {field.name: getattr(self, field.name) for field in fields}
