"""A folder of ArrayRecord shards, and the manifest that says what is in it.

    empty_prompt.npy                         where text is cached: what encoders say of ""
    manifest.json                            written last: with it the folder is whole
    records-00000-of-00008.array_record      each of about as many records, in the source's order
    records-00001-of-00008.array_record
    ...

The manifest is JSON: `records` and `rejected`, how many there are and how many were left out;
`made_of`, what they were made of and how; `latents`, of what space they are, null for images;
`shards`, of each its `file`, its `records`, its `bytes` and their `sha256`, its `rejects`, each a
sentence that names the record and says why, and its `shapes`, where records differ in them.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any

from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole

MANIFEST, EMPTY = "manifest.json", "empty_prompt.npy"
_STATS = 16  # files looked at at a time: a cloud's storage answers slowly, but many at once


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of records.

    Attributes:
      file: its name in the folder.
      records: how many are in it.
      bytes: its size.
      sha256: of its bytes, in hex.
      rejects: what is wrong with each record that was left out.
      shapes: of each record its place in the list of shapes; () where there is one shape.
    """

    file: str
    records: int
    bytes: int
    sha256: str
    rejects: Sequence[str] = ()
    shapes: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """What cached latents are.

    Attributes:
      autoencoder: SHA-256 of the weights that made them, in hex.
      text: SHA-256 of what made the features of captions, in hex; None where none are cached.
      dtype: float16 or float32.
      views: of each image.
      shapes: heights and widths in pixels that images were cropped to.
      crop: as in `Transforms`.
      flip: likewise.
    """

    autoencoder: str
    text: str | None
    dtype: str
    views: int
    shapes: Sequence[Sequence[int]]
    crop: str
    flip: bool


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a folder; see the module's docstring."""

    made_of: dict[str, Any]
    latents: LatentSpace | None
    shards: Sequence[Shard]

    @property
    def records(self) -> int:
        """In all shards."""
        return sum(shard.records for shard in self.shards)

    @property
    def rejected(self) -> int:
        """Records left out."""
        return sum(len(shard.rejects) for shard in self.shards)

    def write(self, folder: epath.Path) -> None:
        """Writes it into its folder."""
        counts = {"records": self.records, "rejected": self.rejected}
        text = json.dumps(counts | dataclasses.asdict(self), indent=1) + "\n"
        write_whole(folder / MANIFEST, text.encode())


def read_manifest(folder: epath.Path) -> Manifest | None:
    """The manifest of a folder; None where it has none.

    Raises:
      UserError: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy the folder anew.") from error
    try:
        return Manifest(
            made_of=data["made_of"],
            latents=None if data["latents"] is None else LatentSpace(**data["latents"]),
            shards=[Shard(**shard) for shard in data["shards"]],
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no manifest of this version of jaxdiff ({error}): prepare the data anew."
        ) from error


def whole_shards(folder: epath.Path, shards: Sequence[Shard]) -> list[bool]:
    """Of each shard, whether its file is there in its full size."""

    def is_whole(shard: Shard) -> bool:
        try:
            return (folder / shard.file).stat().length == shard.bytes
        except OSError:
            return False

    with ThreadPool(_STATS) as pool:
        return pool.map(is_whole, shards)


def check_shards(folder: epath.Path, manifest: Manifest) -> None:
    """Raises `UserError` for shards that are missing or cut short."""
    found = whole_shards(folder, manifest.shards)
    lost = [shard.file for shard, whole in zip(manifest.shards, found, strict=True) if not whole]
    if lost:
        raise UserError(
            f"Of the {len(found)} shards in {folder} {len(lost)} are missing or not of the size "
            f"that {MANIFEST} states, among them {', '.join(lost[:3])}: copy them anew, or run the "
            "`jaxdiff prepare` that wrote them again, which makes what is missing."
        )
