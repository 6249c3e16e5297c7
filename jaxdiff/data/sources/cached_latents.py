"""Cached latents of images and features of their captions.

A record of the ArrayRecord shards consists of

    4 bytes         `JDL1`
    4 bytes         n, the length of the header, an unsigned little-endian integer
    n bytes         the header, JSON: {"name", "captions", "dtype", "shape", "size_crop", "text",
                    "digest"}, and "references" if there are any
    the rest        little-endian float16 or float32: moments of `shape` [v, h, w, 2 c], then text
                    features of shape `text` [k, m] for k captions, if it is not null, then moments
                    of each reference, of the shapes in `references`

The v views are crops of one image, every second one mirrored if `flip` is set. The first c channels
are the mean of z, the others the logarithm of its variance, from which each epoch samples z.
"""

import io
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Natural
from jaxdiff.data.shards import EMPTY, LatentSpace, ShardManifest
from jaxdiff.data.sources.array_record import (
    LATENTS,
    RecordFiles,
    checked_manifest,
    pack,
    unpack,
)
from jaxdiff.data.sources.base import LatentRecord
from jaxdiff.data.sources.prior_preservation import AnySource, PriorPreservation
from jaxdiff.data.transforms import Transforms
from jaxdiff.errors import UserError


@checked
@dataclass(frozen=True, kw_only=True)
class LatentOptions:
    """Settings of cached latents; without views, images are not cached."""

    views: Natural = 0
    """Crops to encode of each image, every second one mirrored if the recipe flips; 0 caches no
    latents."""
    text: bool = False
    """Also cache the features of every caption, and of the empty one, from frozen text encoders."""
    dtype: Literal["float16", "float32"] = "float16"
    """Stored type of moments and text features."""
    batch_size: Count = 32
    """Images or captions that a device encodes at a time."""


@checked
@dataclass(frozen=True, kw_only=True)
class CachedLatents(RecordFiles[LatentRecord]):
    """The folder `path` (local or `gs://`) that `jaxdiff prepare ... --latents.views N` wrote.

    Attributes:
      path: path of the folder.
      of: source of the images. With it, `jaxdiff prepare` writes the folder from this recipe, and
        evaluators find synthetic data sets.
    """

    path: str
    of: AnySource | PriorPreservation | None = None

    def _decode(self, data: bytes) -> LatentRecord:
        return decode_latents(data)

    def check(self) -> None:
        """Raise `UserError` for a folder that is missing, incomplete, or without latents."""
        if self._manifest is None:
            raise UserError(
                f"There are no cached latents in {self.path}: make them with `jaxdiff prepare "
                f"RECIPE {self.path} --latents.views 1`."
            )
        if self.has_text and not (epath.Path(self.path) / EMPTY).exists():
            raise UserError(f"{self.path} lacks {EMPTY}: run its `jaxdiff prepare` command again.")
        if len(self) == 0:
            raise UserError(f"The cache of latents in {self.path} is empty: expected records.")

    def check_transforms(self, transforms: Transforms) -> None:
        """Raise `UserError` for a recipe that crops or flips images differently."""
        space = self.space
        wanted = {
            "shapes": [list(shape) for shape in transforms.shapes],
            "crop": transforms.crop,
            "flip": transforms.flip,
        }
        there = {"shapes": list(map(list, space.shapes)), "crop": space.crop, "flip": space.flip}
        for name, value in wanted.items():
            if value != there[name]:
                raise UserError(
                    f"The latents in {self.path} were cached with {name} {there[name]} but the "
                    f"recipe's data.transforms ask for {value}: change these, or prepare the "
                    "latents again."
                )

    @property
    def vocabulary(self) -> frozenset[str] | None:
        """The words of the captions; None where the source of the images does not state them."""
        return getattr(self.of, "vocabulary", None)

    @property
    def related_words(self) -> dict[str, tuple[str, ...]]:
        """Names in captions by words that are in none; {} where the source states none."""
        return getattr(self.of, "related_words", {})

    @property
    def provenance(self) -> Any:
        """The source of the images, as JSON."""
        return self._manifest and self._manifest.provenance["source"]

    @property
    def has_text(self) -> bool:
        """Whether the folder exists and has text features."""
        return self._manifest is not None and self.space.text is not None

    def text(self, record: LatentRecord, caption: str) -> Float[np.ndarray, " m"] | None:
        """Return the features of one of a record's captions, or of ""; None if not cached."""
        if record["text"] is None:
            return None
        return record["text"][record["captions"].index(caption)] if caption else self._empty

    @property
    def space(self) -> LatentSpace:
        """The encoders of the latents and the settings of crops."""
        manifest = self._manifest
        if manifest is None or manifest.latents is None:
            raise UserError(
                f"{self.path} holds no cached latents: images are read with ArrayRecord as "
                "data.source."
            )
        return manifest.latents

    def image_digest(self, index: int) -> str:
        """Return the digest of a record's image, as `digest_of` does.

        Raises:
          UserError: an earlier version of jaxdiff wrote the record, without a digest.
          RecordError: the record cannot be read.
        """
        digest = self[index]["digest"]
        if digest is None:
            raise UserError(
                f"The latents in {self.path} are without the digests of their images, by which "
                "data.held_out selects: expected latents of this version of jaxdiff; prepare them "
                "again in another folder, start the run with --fresh, or set data.held_out to 0."
            )
        return digest

    def sizes(self, references: int) -> Int[np.ndarray, "n images 2"]:
        """Return width and height, in pixels, of the crop of each image and of its references.

        The latter are the first `references` of each; sizes are 0 where there are fewer.
        """
        shapes = np.array([*self.space.shapes, (0, 0)])
        assert self._manifest is not None  # as in `space`
        places, start = np.full((self._manifest.records, 1 + references), -1), 0
        for shard in self._manifest.shards:
            rows = places[start : start + shard.records]
            rows[:, 0] = shard.shapes or 0
            for row, found in zip(rows, shard.references, strict=False):
                row[1 : 1 + len(found)] = found[:references]
            start += shard.records
        return shapes[places][..., ::-1]

    @cached_property
    def _empty(self) -> np.ndarray:
        return np.load(io.BytesIO((epath.Path(self.path) / EMPTY).read_bytes()), allow_pickle=False)

    @cached_property
    def _manifest(self) -> ShardManifest | None:
        return checked_manifest(self.path)


def encode_latents(record: LatentRecord) -> bytes:
    """Encode a record as the module's docstring specifies."""
    moments, text, references = record["moments"], record["text"], record.get("references", [])
    header: dict[str, Any] = {
        "name": record["name"],
        "captions": record["captions"],
        "dtype": moments.dtype.name,
        "shape": list(moments.shape),
        "size_crop": record["size_crop"].tolist(),
        "text": None if text is None else list(text.shape),
        "digest": record["digest"],
        **({"references": [list(x.shape) for x in references]} if references else {}),
    }
    little = moments.dtype.newbyteorder("<")
    arrays = [x for x in (moments, text, *references) if x is not None]
    parts = [np.ascontiguousarray(x, little).tobytes() for x in arrays]
    return pack(LATENTS, header, b"".join(parts))


def decode_latents(data: bytes) -> LatentRecord:
    """Decode a record, the inverse of `encode_latents`.

    Raises `ValueError`, `KeyError` or `TypeError` for bytes in another encoding.
    """
    header, payload = unpack(LATENTS, data)
    if header["dtype"] not in ("float16", "float32"):
        raise ValueError(f"latents of type {header['dtype']}, not float16 or float32")
    dtype = np.dtype(header["dtype"]).newbyteorder("<")
    shapes = [header["shape"], header["text"] or [0], *header.get("references", [])]
    values, ends = np.frombuffer(payload, dtype), np.cumsum([math.prod(s) for s in shapes])
    if len(values) != ends[-1]:
        raise ValueError(f"{len(values)} numbers, not {ends[-1]}")
    arrays = [x.reshape(s) for x, s in zip(np.split(values, ends[:-1]), shapes, strict=True)]
    digest = header.get("digest")  # earlier versions wrote none
    if digest is not None and not re.fullmatch("[0-9a-f]{12}", digest):
        raise ValueError(f"the digest {digest!r} is not six bytes in hex")
    return {
        "moments": arrays[0],
        "text": arrays[1] if header["text"] else None,
        "size_crop": np.array(header["size_crop"], np.int32),
        "captions": header["captions"],
        "name": header["name"],
        "digest": digest,
        "references": arrays[2:],
    }
