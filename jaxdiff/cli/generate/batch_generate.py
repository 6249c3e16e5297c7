"""`sample.py --prompts FILE`: thousands of prompts, grouped so that little compiles, resumable."""

import functools
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from rich.console import Console

from jaxdiff.cli.generate.generate import draw_together
from jaxdiff.cli.generate.image_files import Format, image_bytes
from jaxdiff.cli.generate.image_metadata import as_set, details, file_text
from jaxdiff.cli.generate.manifest import MANIFEST, Manifest, Record
from jaxdiff.cli.generate.options import SampleOptions, defaults, fixed, open_pipeline, preview
from jaxdiff.cli.generate.prompt_file import BadRow, Row, read_prompts, slug
from jaxdiff.cli.generate.settings import ImageSettings, open_input, settle
from jaxdiff.distributed.multihost import is_host0, sum_over_hosts
from jaxdiff.errors import UserError
from jaxdiff.io import images as pictures
from jaxdiff.pipelines.batching import Preview
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.sizes import images_at_a_time
from jaxdiff.pretrained.load import make_folder
from jaxdiff.training.metrics import Progress

LARGEST_GRID = 400  # images; more are too small to tell apart on any screen


class Job(NamedTuple):
    """One image that there shall be."""

    line: int
    file: str
    settings: ImageSettings
    record: Record


class Complaints:
    """Tells which rows cannot be drawn, and counts them."""

    def __init__(self, name: str):
        self._name = name
        self._of_all: set[int] = set()
        self._own: set[int] = set()

    def all_find(self, row: BadRow) -> None:
        """A row of which every process finds the same."""
        self._of_all.add(row.line)
        if is_host0():
            self._tell(row)

    def this_finds(self, row: BadRow) -> None:
        """A row that only the process that was to draw it finds bad."""
        self._own.add(row.line)
        self._tell(row)

    def _tell(self, row: BadRow) -> None:
        print(f"{self._name}, line {row.line}: {row.reason}", file=sys.stderr)

    def count(self) -> int:
        """How many rows all processes found."""
        return len(self._of_all) + sum_over_hosts(len(self._own - self._of_all))


def draw_file(options: SampleOptions) -> int:
    """Draws what of a file of prompts is not in the folder yet; returns how many rows are bad.

    Each process draws a share of it, and all return the same.

    Raises:
      UserError: the file or the model cannot be read.
    """
    start = time.perf_counter()
    file = str(options.prompts)
    name = epath.Path(file).name
    rows, bad = read_prompts(file)
    complaints = Complaints(name)
    for row in bad:
        complaints.all_find(row)
    folder = make_folder(options.out)
    drawn = _draw_rows(rows, folder, options, name, complaints) if rows else 0
    print(f"{drawn} images in {time.perf_counter() - start:.1f} s, compile included.")
    count = complaints.count()
    if count and is_host0():
        print(
            f"{count} of {len(rows) + len(bad)} rows of {name} could not be drawn, as told above: "
            "repair them and start again.",
            file=sys.stderr,
        )
    return count


def _draw_rows(
    rows: Sequence[Row],
    folder: epath.Path,
    options: SampleOptions,
    name: str,
    complaints: Complaints,
) -> int:
    """Draws this process's share of what is not there yet; returns how many images it drew."""
    process, processes = jax.process_index(), jax.process_count()
    pipeline = open_pipeline(options)
    jobs = _plan(rows, pipeline, options, name, complaints)
    records = [job.record for job in jobs]
    manifest = None
    if process == 0:
        manifest = Manifest(folder, name, records, processes=processes)
    _meet("the manifest is in order")
    if manifest is None:
        manifest = Manifest(folder, name, records, process=process, processes=processes)
    # Like one after another, so that every process gets as many of each kind.
    alike = [job for call in calls(jobs, 1) for job in call]
    mine = alike[process::processes]
    left = [job for job in mine if not manifest.has(job.file)]
    there = len(mine) - len(left)
    look = preview(options, pipeline, folder)
    console = Console(stderr=True)
    with Progress(len(mine), start=there, unit="image", console=console) as progress:
        drawn = _draw(pipeline, left, manifest, progress, there, complaints, options.format, look)
    _meet("all is drawn")
    manifest.close()
    if process == 0:
        print(folder / MANIFEST)
        if options.grid:
            _save_grids(folder, jobs)
    if there:
        print(f"{there} images were there already.")
    return drawn


def _meet(where: str) -> None:
    """Waits until all processes are there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _save_grids(folder: epath.Path, jobs: Sequence[Job]) -> None:
    """`grid.png`, or `grid-WIDTHxHEIGHT.png` for each size where there are several."""
    sizes: dict[tuple[int, int], list[Job]] = {}
    for job in jobs:
        if (folder / job.file).exists():  # not one that could not be drawn
            sizes.setdefault(job.settings.drawn_size, []).append(job)
    for (width, height), some in sizes.items():
        shown = some[:LARGEST_GRID]
        images = np.stack([pictures.read_picture(folder / job.file) for job in shown])
        captions = [job.settings.prompt for job in shown] if width >= 48 else None
        which = f"-{width}x{height}" if len(sizes) > 1 else ""
        path = folder / f"grid{which}.png"
        pictures.save_png(path, pictures.grid(images, captions=captions))
        print(path)


def _plan(
    rows: Sequence[Row],
    pipeline: Pipeline,
    options: SampleOptions,
    source: str,
    complaints: Complaints,
) -> list[Job]:
    """The images of all rows that can be drawn, in their order.

    Raises:
      UserError: an image that the command line names cannot be read.
    """
    jobs: dict[str, Job] = {}
    given = defaults(options)
    opened = functools.cache(open_input)
    for path in (given.init_image, given.mask):
        if path is not None:
            opened(path)  # a mistake on the command line is none of the rows'
    for row in rows:
        try:
            settings = settle(row, given, pipeline, fixed(options), opened=opened)
            copies = settings.copies(options.num_images)
            new = [_job(row, copy, i, options, pipeline, source) for i, copy in enumerate(copies)]
            taken = next((jobs[job.file] for job in new if job.file in jobs), None)
            if taken:
                raise UserError(
                    f"its file {taken.file} is that of line {taken.line}: give it another name."
                )
        except UserError as error:
            complaints.all_find(BadRow(row.line, str(error)))
            continue
        jobs |= {job.file: job for job in new}
        if pipeline.truncated(row.prompt) and is_host0():
            print(
                f"{source}, line {row.line}: the prompt is longer than the "
                f"{pipeline.tokenizer.length} tokens that the text encoder takes: its end is cut "
                "off.",
                file=sys.stderr,
            )
    return list(jobs.values())


def _job(
    row: Row,
    settings: ImageSettings,
    copy: int,
    options: SampleOptions,
    pipeline: Pipeline,
    source: str,
) -> Job:
    stem = slug(row.name or "", otherwise=f"{row.number:04d}")
    which = f"-{copy}" if options.num_images > 1 else ""
    file = f"{stem}{which}-{slug(row.prompt)}.{options.format}"
    record = {
        "prompts": source,
        "row": row.number,
        "file": file,
        "prompt": row.prompt,
        "seed": settings.seed,
        "settings": as_set(settings, pipeline),
        "details": details(settings, pipeline),
        "model": pipeline.config.name,
        "model_fingerprint": pipeline.fingerprint,
    }
    return Job(row.line, file, settings, record)


def calls(jobs: Sequence[Job], devices: int) -> Iterator[list[Job]]:
    """Jobs that one call draws, those that one compiled loop draws after one another.

    Larger sizes come later: if memory does not last for them, the others are there. Else the
    order of the first of each kind is kept, and within each kind that of the steps and the rows.
    """
    groups: dict[Any, dict[Any, list[Job]]] = {}
    for job in jobs:
        some = groups.setdefault(job.settings.shape_group, {})
        some.setdefault(job.settings.call_group, []).append(job)
    ordered = sorted(groups.values(), key=lambda some: math.prod(_first(some).settings.drawn_size))
    for group in itertools.chain.from_iterable(some.values() for some in ordered):
        size = images_at_a_time(*group[0].settings.size)
        kinds: dict[Any, list[Job]] = {}
        for job in sorted(group, key=lambda job: job.settings.num_steps):
            kinds.setdefault(job.settings.batch_group, []).append(job)
        # One device takes at a time what has the same steps.
        some = [kind[i : i + size] for kind in kinds.values() for i in range(0, len(kind), size)]
        for i in range(0, len(some), devices):
            yield list(itertools.chain.from_iterable(some[i : i + devices]))


def _first(groups: dict[Any, list[Job]]) -> Job:
    return next(iter(groups.values()))[0]


def _draw(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    manifest: Manifest,
    progress: Progress,
    there: int,
    complaints: Complaints,
    kind: Format,
    look: Preview | None,
) -> int:
    """Draws jobs and writes those of each call at once; returns how many could be drawn."""
    drawn, shown, compiled = 0, there, set()
    for call in calls(jobs, len(pipeline.devices)):
        start = time.perf_counter()
        made = _try(pipeline, call, look)
        seconds = (time.perf_counter() - start) / len(call)
        before = drawn
        for job, one in zip(call, made, strict=True):
            try:
                if isinstance(one, UserError):
                    raise one
                image, settings = one
                data = image_bytes(image, file_text(settings, pipeline), kind)
            except UserError as error:
                complaints.this_finds(BadRow(job.line, str(error)))
                continue
            chosen = {"chosen_seed": settings.seed} if job.settings.choice else {}
            manifest.add(job.record, data, seconds, **chosen)
            drawn += 1
        there += len(call)
        if drawn == before:
            continue  # what takes no time would spoil the rate
        rate = (drawn - before) / (time.perf_counter() - start)
        group = call[0].settings.shape_group  # whose first call compiles
        progress.update(there, images_per_s=rate if group in compiled else None)
        compiled.add(group)
        shown = there
    if shown < there:
        progress.update(there)
    return drawn


def _try(
    pipeline: Pipeline, call: Sequence[Job], look: Preview | None
) -> Sequence[tuple[np.ndarray, ImageSettings] | UserError]:
    """An image of each job, or why it cannot be drawn, which may be the fault of one alone."""
    try:
        drawn = draw_together(pipeline, [job.settings for job in call], preview=look)
        return list(zip(*drawn, strict=True))
    except UserError as error:
        if len(call) == 1:
            return [error]
        return [one for job in call for one in _try(pipeline, [job], look)]
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        width, height = call[0].settings.drawn_size
        reason = f"there is not enough memory to draw {width}x{height}: choose a smaller size."
        return [UserError(reason) for _ in call]
