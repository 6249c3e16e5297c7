"""Making the shards of a data set, or of its latents: by hand, or by a run for itself."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from etils import epath
from rich.console import Console

from jaxdiff.config.serialization import to_json
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.shard_writer import (
    RecordReader,
    ShardProgress,
    ShardRange,
    Workers,
    check_same,
    shard_ranges,
    write_images,
)
from jaxdiff.data.shards import Shard, ShardManifest, read_manifest, whole_shards
from jaxdiff.data.sources.cached_latents import CachedLatents, LatentOptions
from jaxdiff.data.sources.prior_preservation import AnySource, PriorPreservation
from jaxdiff.data.transforms import Transforms
from jaxdiff.distributed.multihost import run_on_host0
from jaxdiff.errors import UserError
from jaxdiff.pretrained.load import make_folder
from jaxdiff.training.latent_cache import Cache, make_cache, write_empty, write_latents
from jaxdiff.training.metrics import Progress
from jaxdiff.training.recipe import Config

# Records of a shard, and shards at most, unless told otherwise.
_IMAGES, _LATENTS, _MOST = 4096, 1024, 1024
_LEAST = 512  # records for which a process is worth its start


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How the work is cut up."""

    shards: int | None = None
    """Files to write; by default one for every 4096 images, or 1024 images' latents, 1024 at
    most."""
    workers: int | None = None
    """Processes that read, draw or decode; 0: this one alone. By default one for each core, where
    there is enough to do."""
    host: int = 0
    """Number of this machine, from 0, where several write their share of the shards."""
    hosts: int = 1
    """How many machines those are; the last one to finish writes the manifest."""
    latents: LatentOptions = field(default_factory=LatentOptions)


def with_cache(config: Config, folder: epath.Path) -> Config:
    """A recipe that asks for it on the latents in `folder`, which are made now if they are not.

    Raises:
      UserError: as `write_records`.
    """
    data = config.data
    if not data.cache.views:
        return config
    assert not isinstance(data.source, CachedLatents)  # as `check_cache` sees to
    sharing = Sharing(latents=data.cache)

    def write() -> None:
        write_records(config, data, str(folder), sharing)

    run_on_host0(write)
    source = CachedLatents(path=str(folder), of=data.source)
    done = dataclasses.replace(data, source=source, cache=LatentOptions())
    return dataclasses.replace(config, data=done)


def write_records(
    config: Config | None, data: DataConfig, out: str, sharing: Sharing
) -> ShardManifest | None:
    """Writes the shards that are not there yet, and the manifest once all are.

    Args:
      config: the recipe whose autoencoder makes latents; None for images.
      data: the records, and how they are cropped.
      out: the folder.
      sharing: how the work is cut up.

    Returns:
      The manifest; None while other machines have shards to write.

    Raises:
      UserError: unusable data, a folder that holds something else, or one that cannot be written.
    """
    source = data.source
    if isinstance(source, CachedLatents):
        if source.of is None:
            raise UserError(
                "The recipe trains on cached latents, and data.source.of does not say of what: "
                "prepare the recipe whose data.source has the images."
            )
        source = source.of
    _check_sharing(sharing)
    source.check()
    cache = None
    if sharing.latents.views or sharing.latents.text:
        assert config is not None  # as was checked
        cache = make_cache(config, sharing.latents)
    usual = max(1, min(_MOST, -(-len(source) // (_LATENTS if cache else _IMAGES))))
    count = min(sharing.shards or usual, len(source))
    seen = dataclasses.replace(data.transforms, caption_dropout=0.0)  # captions stay as they are
    provenance: dict[str, Any] = {
        "source": to_json(source),
        "transforms": to_json(seen if cache else Transforms(size=1, max_pixels=seen.max_pixels)),
        "shards": count,
        "latents": cache and dataclasses.asdict(cache.space),
    }
    folder = make_folder(out)
    return _Work(source, data.transforms, folder, cache, provenance, sharing).run(count)


def _check_sharing(sharing: Sharing) -> None:
    if sharing.shards is not None and sharing.shards < 1:
        raise UserError(f"--shards {sharing.shards}: expected a positive number.")
    if sharing.workers is not None and sharing.workers < 0:
        raise UserError(f"--workers {sharing.workers}: expected 0 or a positive number.")
    if not 0 <= sharing.host < sharing.hosts:
        raise UserError(
            f"--host {sharing.host} of --hosts {sharing.hosts}: expected a number from 0 and below "
            "that of the hosts."
        )


@dataclass(frozen=True)
class _Work:
    """What is to be made, of what, and where."""

    source: AnySource | PriorPreservation
    transforms: Transforms
    folder: epath.Path
    cache: Cache | None
    provenance: dict[str, Any]
    sharing: Sharing

    def run(self, count: int) -> ShardManifest | None:
        """Writes what is missing of `count` shards, and the manifest once none is."""
        manifest = read_manifest(self.folder)
        if manifest is not None:
            check_same(manifest.provenance, self.provenance, self.folder)
        notes = ShardProgress(self.folder, self.provenance)
        known = {shard.file: shard for shard in manifest.shards} if manifest else {}
        done = self._whole({**known, **notes.read()})
        parts = shard_ranges(len(self.source), count)
        mine = parts[self.sharing.host :: self.sharing.hosts]
        for shard in self._write([part for part in mine if part.file not in done]):
            for reject in shard.rejects:
                print(f"Skipped {reject}", file=sys.stderr)
            done[shard.file] = shard
        if self.sharing.hosts > 1:  # what the others wrote meanwhile
            done |= self._whole(notes.read())
        if len(done) < count:
            return None
        manifest = ShardManifest(
            provenance=self.provenance,
            latents=self.cache and self.cache.space,
            shards=[done[part.file] for part in parts],
        )
        if manifest.records == 0:
            for part in parts:
                (self.folder / part.file).unlink()
            notes.remove()
            raise UserError(
                f"None of the {manifest.rejected} records can be used, as told above: repair them, "
                "or name other data in data.source."
            )
        if self.cache:
            write_empty(self.folder, self.cache)
        manifest.write(self.folder)
        if self.sharing.hosts == 1:  # or another may be about to read them
            notes.remove()
        return manifest

    def _whole(self, known: dict[str, Shard]) -> dict[str, Shard]:
        shards = list(known.values())
        found = whole_shards(self.folder, shards)
        return {s.file: s for s, whole in zip(shards, found, strict=True) if whole}

    def _write(self, todo: list[ShardRange]) -> Iterator[Shard]:
        total = sum(part.stop - part.start for part in todo)
        if not todo:
            return
        reader = RecordReader(source=self.source, transforms=self.transforms)
        workers = Workers(self._workers(total, len(todo)), reader)
        console = Console(stderr=True)
        with closing(workers), Progress(total, unit="record", console=console) as progress:
            if self.cache is None:
                jobs = [(str(self.folder), part) for part in todo]
                count = 0
                for part, shard in zip(todo, workers.map(write_images, jobs), strict=True):
                    count += part.stop - part.start
                    progress.update(count)
                    yield shard
            else:
                yield from write_latents(self.folder, todo, workers, self.cache, progress.update)

    def _workers(self, records: int, shards: int) -> int:
        if self.sharing.workers is not None:
            return self.sharing.workers
        most = min(os.cpu_count() or 1, records // _LEAST)
        return most if self.cache else min(most, shards)
