"""Write the shards of a data set, or of its latents, for `jaxdiff prepare` or for a run."""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Natural
from jaxdiff.config.serialization import to_json
from jaxdiff.data.bad_records import Account, Reject, account_of, left_out_of
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
from jaxdiff.data.shards import MANIFEST, Shard, ShardManifest, read_manifest, whole_shards
from jaxdiff.data.sources.cached_latents import CachedLatents, LatentOptions
from jaxdiff.data.sources.prior_preservation import AnySource, PriorPreservation
from jaxdiff.data.transforms import Transforms
from jaxdiff.distributed.multihost import run_on_host0
from jaxdiff.errors import UserError
from jaxdiff.io.lock import output_folder
from jaxdiff.io.terminal import console, write_line
from jaxdiff.io.text import check_text
from jaxdiff.training.beam_shards import BeamJob, write_with_beam
from jaxdiff.training.latent_cache import Cache, make_cache, write_empty, write_latents
from jaxdiff.training.metrics import Progress
from jaxdiff.training.recipe import Config

# Defaults: images and latents per shard, the largest number of shards.
_IMAGES, _LATENTS, _MAX_SHARDS = 4096, 1024, 1024
_NAMED = 20  # rejects of a shard that are printed
_RECORDS_PER_WORKER = 512  # fewer are not worth the start of a process


@checked
@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How the work is split into shards, processes and machines."""

    shards: Count | None = None
    """Files to write; by default one per 4096 images, or latents of 1024 images, at most 1024."""
    workers: Natural | None = None
    """Processes that read, render or decode; 0 is this process alone. By default one per core, and
    at least 512 records each."""
    host: Natural = 0
    """Index of this machine, from 0, where several write shards."""
    hosts: Count = 1
    """Number of machines; the last one to finish writes the manifest."""
    runner: str | None = None
    """Runner of Apache Beam that writes the shards, such as DirectRunner or DataflowRunner."""
    runner_options: tuple[str, ...] = ()
    """Options of the runner, each NAME=VALUE, such as region=us-central1."""
    latents: LatentOptions = field(default_factory=LatentOptions)


def with_cache(config: Config, folder: epath.Path) -> tuple[Config, Account]:
    """Return a recipe on cached latents in `folder`, encoding missing ones, if it sets `cache`.

    The account is that of its source's records, those included that could not be encoded.

    Raises:
      UserError: as `write_records`, or more than `data.max_bad_fraction` are left out.
    """
    data = config.data
    if not data.cache.views:
        return config, account_of(data.source)
    assert not isinstance(data.source, CachedLatents)  # see `check_cache`

    def write() -> None:
        write_records(config, data, str(folder), Sharing(latents=data.cache))

    run_on_host0(write)
    manifest = read_manifest(folder)
    assert manifest is not None
    manifest.account.check(data.max_bad_fraction)
    source = CachedLatents(path=str(folder), of=data.source)
    done = dataclasses.replace(data, source=source, cache=LatentOptions())
    return dataclasses.replace(config, data=done), manifest.account


def write_records(
    config: Config | None, data: DataConfig, out: str, sharing: Sharing
) -> ShardManifest | None:
    """Write missing shards to the folder `out`, and the manifest once all exist.

    `config` is the recipe whose autoencoder encodes latents; None for images.

    Returns:
      The manifest; None while other machines have shards to write.

    Raises:
      UserError: the data are unusable, or the folder has other contents or is not writable.
    """
    source = data.source
    if isinstance(source, CachedLatents):
        if source.of is None:
            raise UserError(
                "The recipe trains on cached latents but data.source.of does not say of what: "
                "expected a source of images; set it, or prepare the recipe that has one."
            )
        source = source.of
    _check_sharing(sharing)
    source.check()
    cache = None
    if sharing.latents.views or sharing.latents.text:
        assert config is not None  # checked by the command
        cache = make_cache(config, sharing.latents)
    usual = max(1, min(_MAX_SHARDS, -(-len(source) // (_LATENTS if cache else _IMAGES))))
    count = min(sharing.shards or usual, len(source))
    seen = dataclasses.replace(data.transforms, caption_dropout=0.0)  # no caption is dropped
    provenance: dict[str, Any] = {
        "source": to_json(source),
        "transforms": to_json(seen if cache else Transforms(size=1, max_pixels=seen.max_pixels)),
        "found": len(source) + len(left_out_of(source).rejects),
        "shards": count,
        "latents": cache and dataclasses.asdict(cache.space),
    }
    if cache:
        assert config is not None
        # A batch size changes the last bits alone: it may change where memory ran out.
        provenance["train"] = {"compute": config.train.compute}
    share = f"host{sharing.host}" if sharing.hosts > 1 else None
    with output_folder(out, share=share) as folder:
        job = _ShardJob(source, data.transforms, folder, cache, provenance, sharing, config)
        return job.run(count)


def _check_sharing(sharing: Sharing) -> None:
    if sharing.host >= sharing.hosts:
        raise UserError(
            f"--host {sharing.host} of --hosts {sharing.hosts}: expected a number from 0 and below "
            "that of the hosts."
        )
    if sharing.runner is None and sharing.runner_options:
        raise UserError(
            "--runner-options are those of a runner, which is not set: expected --runner; give it, "
            "or leave the options out."
        )
    if sharing.runner is not None and (sharing.hosts > 1 or sharing.workers is not None):
        raise UserError(
            "--runner divides the work itself: expected no --hosts and no --workers beside it; "
            "leave them out, or give the runner's own among --runner-options."
        )
    for option in sharing.runner_options:
        check_text(option, "An option of --runner-options")
        if not re.fullmatch(r"\w+=.+", option):
            raise UserError(
                f"--runner-options has {option!r}: expected NAME=VALUE, without dashes."
            )


@dataclass(frozen=True)
class _ShardJob:
    """The shards of one folder."""

    source: AnySource | PriorPreservation
    transforms: Transforms
    folder: epath.Path
    cache: Cache | None
    provenance: dict[str, Any]
    sharing: Sharing
    config: Config | None

    def run(self, count: int) -> ShardManifest | None:
        """Write the missing ones of `count` shards, and the manifest once all exist."""
        manifest = read_manifest(self.folder)
        if manifest is not None:
            check_same(manifest.provenance, self.provenance, self.folder)
        progress = ShardProgress(self.folder, self.provenance, alone=self.sharing.hosts == 1)
        known = {shard.file: shard for shard in manifest.shards} if manifest else {}
        parts = shard_ranges(len(self.source), count)
        done = self._complete(parts, {**known, **progress.read()})
        mine = parts[self.sharing.host :: self.sharing.hosts]
        left_out = left_out_of(self.source)
        self._print(left_out.rejects)
        todo = [part for part in mine if part.file not in done]
        written = self._write if self.sharing.runner is None else self._write_with_beam
        for shard in written(todo):
            self._print(shard.rejects)
            done[shard.file] = shard
        if self.sharing.hosts > 1:  # the others may have finished meanwhile
            done |= self._complete(parts, progress.read())
        if len(done) < count:
            return None
        manifest = ShardManifest(
            provenance=self.provenance,
            latents=self.cache and self.cache.space,
            shards=[done[part.file] for part in parts],
            found=self.provenance["found"],
            left_out=left_out,
        )
        account = manifest.account
        if account.used == 0:
            for part in parts:
                (self.folder / part.file).unlink()
            progress.remove()
            raise UserError(
                f"None of the {account.found} records is usable, for the reasons above: repair "
                "them, or name other data in data.source."
            )
        if self.cache:
            write_empty(self.folder, self.cache)
        manifest.write(self.folder)
        if self.sharing.hosts == 1:  # other hosts may still read the entries
            progress.remove()
        return manifest

    def _print(self, rejects: Sequence[Reject]) -> None:
        for reject in rejects[:_NAMED]:
            write_line(f"Skipped {reject}", stderr=True)
        if len(rejects) > _NAMED:
            more = len(rejects) - _NAMED
            write_line(f"Skipped {more} more; {MANIFEST} names all", stderr=True)

    def _complete(self, parts: list[ShardRange], known: dict[str, Shard]) -> dict[str, Shard]:
        shards = [known[p.file] for p in parts if p.file in known and p.holds(known[p.file])]
        found = whole_shards(self.folder, shards)
        return {s.file: s for s, whole in zip(shards, found, strict=True) if whole}

    def _write(self, todo: list[ShardRange]) -> Iterator[Shard]:
        if not todo:
            return
        total = sum(part.stop - part.start for part in todo)
        reader = RecordReader(source=self.source, transforms=self.transforms)
        workers = Workers(self._workers(total, len(todo)), reader)
        notes = console(stderr=True)
        with closing(workers), Progress(total, unit="record", console=notes) as progress:
            if self.cache is None:
                jobs = [(str(self.folder), part) for part in todo]
                count = 0
                for part, shard in zip(todo, workers.map(write_images, jobs), strict=True):
                    count += part.stop - part.start
                    progress.update(count)
                    yield shard
            else:
                yield from write_latents(self.folder, todo, workers, self.cache, progress.update)

    def _write_with_beam(self, todo: list[ShardRange]) -> list[Shard]:
        """Write shards on a runner; return them.

        Raises:
          UserError: shards that the runner wrote are not in the folder.
        """
        if not todo:
            return []
        runner = self.sharing.runner
        assert runner is not None
        reader = RecordReader(source=self.source, transforms=self.transforms)
        config = self.config if self.cache else None
        job = BeamJob(
            folder=str(self.folder), reader=reader, config=config, latents=self.sharing.latents
        )
        total = sum(part.stop - part.start for part in todo)
        entries = ShardProgress(self.folder, self.provenance, alone=True)
        with Progress(total, unit="record", console=console(stderr=True)) as progress:

            def look() -> None:
                shards = self._complete(todo, entries.read()).values()
                progress.update(sum(shard.records + len(shard.rejects) for shard in shards))

            write_with_beam(job, todo, runner, self.sharing.runner_options, look)
        there = self._complete(todo, entries.read())
        if len(there) < len(todo):
            raise UserError(
                f"{len(todo) - len(there)} shards of {runner} are not in {self.folder}: expected a "
                "folder that all its workers write to; give one in gs:// or on a shared disk."
            )
        return [there[part.file] for part in todo]

    def _workers(self, records: int, shards: int) -> int:
        if self.sharing.workers is not None:
            return self.sharing.workers
        most = min(os.cpu_count() or 1, records // _RECORDS_PER_WORKER)
        return most if self.cache else min(most, shards)
