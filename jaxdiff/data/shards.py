"""A folder of ArrayRecord shards and its manifest.

    empty_prompt.npy                         text features of "", where text is cached
    manifest.json                            written last: it marks the folder as complete
    records-00000-of-00008.array_record      about equally many records each, in source order
    records-00001-of-00008.array_record
    ...

The manifest is JSON: `found`, `records` and `rejected`, the numbers of records found, written and
left out; `reasons`, the number left out by kind of reason; `provenance`, source and settings;
`latents`, the latent space, null for images; `left_out`, what the source did not count as records;
`shards`, a list of `file`, `records`, `bytes`, `sha256`, `rejects` (name, reason and kind of each
record left out), and `shapes` and `references` (per record, where they differ).
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from jaxdiff.data.bad_records import Account, LeftOut, Reject
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.io.text import format_json, read_json

MANIFEST, EMPTY = "manifest.json", "empty_prompt.npy"
_STATS = 16  # concurrent requests for file sizes: remote storage has a high latency


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of records.

    Attributes:
      file: name in the folder.
      records: number of records.
      bytes: file size.
      sha256: hex digest of the file.
      rejects: the records left out.
      shapes: index into the list of shapes, per record; () where there is one shape.
      references: indices of the shapes of reference images, per record; () where there are none.
    """

    file: str
    records: int
    bytes: int
    sha256: str
    rejects: Sequence[Reject] = ()
    shapes: Sequence[int] = ()
    references: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """The encoders and settings of cached latents.

    Attributes:
      autoencoder: SHA-256 of the encoder's weights, in hex.
      text: SHA-256 of the text encoders and tokenizer, in hex; None where text is not cached.
      dtype: float16 or float32.
      views: crops per image.
      shapes: heights and widths in pixels that images were cropped to.
      crop: as in `Transforms`.
      flip: as in `Transforms`.
    """

    autoencoder: str
    text: str | None
    dtype: str
    views: int
    shapes: Sequence[Sequence[int]]
    crop: str
    flip: bool


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """The manifest of a folder of shards; see the module's docstring."""

    provenance: dict[str, Any]
    latents: LatentSpace | None
    shards: Sequence[Shard]
    found: int
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def records(self) -> int:
        """Records in all shards."""
        return sum(shard.records for shard in self.shards)

    @cached_property
    def account(self) -> Account:
        """All records of the source: those in the shards, and those left out.

        Raises:
          UserError: they are not all.
        """
        rejects = tuple(reject for shard in self.shards for reject in shard.rejects)
        left_out = self.left_out + LeftOut(rejects=rejects)
        return Account(found=self.found, used=self.records, left_out=left_out)

    def write(self, folder: epath.Path) -> None:
        """Write the manifest to its folder."""
        account = self.account
        counts = {
            "found": account.found,
            "records": account.used,
            "rejected": len(account.left_out.rejects),
            "reasons": account.reasons,
        }
        text = format_json(counts | dataclasses.asdict(self), indent=1) + "\n"
        write_whole(folder / MANIFEST, text.encode())


def read_manifest(folder: epath.Path) -> ShardManifest | None:
    """Read the manifest of a folder; None where there is none.

    Raises:
      UserError: it cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    data = read_json(path, "a folder that `jaxdiff prepare` wrote")
    try:
        latents, left_out = data["latents"], data["left_out"]
        manifest = ShardManifest(
            provenance=data["provenance"],
            latents=None if latents is None else LatentSpace(**latents),
            shards=[shard_from_json(shard) for shard in data["shards"]],
            found=data["found"],
            left_out=LeftOut(**left_out | {"rejects": _rejects(left_out)}),
        )
        _ = manifest.account
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not a manifest of this version of jaxdiff ({error}): run `jaxdiff prepare` "
            "again into another folder."
        ) from error
    except UserError as error:
        raise UserError(f"{path} disagrees with itself: {error}") from error
    return manifest


def shard_from_json(data: dict[str, Any]) -> Shard:
    """Return a shard of a manifest, or one whose entry stands alone.

    Raises `KeyError`, `TypeError` or `ValueError` for other data.
    """
    shard = Shard(**data | {"rejects": _rejects(data), "shapes": tuple(data["shapes"])})
    counts = shard.records, shard.bytes, *shard.shapes, *itertools.chain(*shard.references)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"the counts of {shard.file} are no natural numbers")
    if PurePosixPath(shard.file).name != shard.file:
        raise ValueError(f"{shard.file} is not in its folder")
    return shard


def _rejects(data: dict[str, Any]) -> tuple[Reject, ...]:
    return tuple(Reject(**reject) for reject in data["rejects"])


def whole_shards(folder: epath.Path, shards: Sequence[Shard]) -> list[bool]:
    """For each shard, whether its file exists in full size."""

    def is_whole(shard: Shard) -> bool:
        try:
            return (folder / shard.file).stat().length == shard.bytes
        except OSError:
            return False

    with ThreadPool(_STATS) as pool:
        return pool.map(is_whole, shards)


def check_shards(folder: epath.Path, manifest: ShardManifest) -> None:
    """Raise `UserError` if shards are missing or truncated."""
    found = whole_shards(folder, manifest.shards)
    lost = [shard.file for shard, whole in zip(manifest.shards, found, strict=True) if not whole]
    if lost:
        raise UserError(
            f"{len(lost)} of the {len(found)} shards in {folder} are missing or differ in size "
            f"from {MANIFEST}, among them {', '.join(lost[:3])}: copy them again, or repeat the "
            "`jaxdiff prepare` command, which writes missing shards."
        )
