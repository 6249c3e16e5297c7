"""`sample.py --prompts FILE`: thousands of prompts, grouped so that little compiles, resumable."""

import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from rich.console import Console

from jaxdiff import pictures
from jaxdiff.bundle import make_folder
from jaxdiff.errors import UserError
from jaxdiff.image_settings import (
    ImageSettings,
    as_set,
    details,
    draw_together,
    open_input,
    png_text,
    settle,
)
from jaxdiff.manifest import MANIFEST, Manifest, Record
from jaxdiff.pipeline import LARGEST_SEED, Pipeline, images_at_a_time
from jaxdiff.prompt_file import BadRow, Row, read_prompts, slug
from jaxdiff.sample_options import SampleOptions, defaults, open_pipeline
from jaxdiff.training.metrics import Progress


class Job(NamedTuple):
    """One image that there shall be."""

    line: int
    file: str
    settings: ImageSettings
    record: Record


def draw_file(options: SampleOptions) -> int:
    """Draws what of a file of prompts is not in the folder yet; returns how many rows are bad.

    Raises:
      UserError: the file or the model cannot be read.
    """
    start = time.perf_counter()
    file = str(options.prompts)
    name = epath.Path(file).name
    given = defaults(options)
    rows, bad = read_prompts(file)
    bad_lines: set[int] = set()

    def tell(row: BadRow) -> None:
        bad_lines.add(row.line)
        print(f"{name}, line {row.line}: {row.reason}", file=sys.stderr)

    for row in bad:
        tell(row)
    folder = make_folder(options.out)
    drawn, jobs = 0, []
    if rows:
        pipeline = open_pipeline(options)
        jobs = _plan(rows, given, pipeline, options, name, tell)
        manifest = Manifest(folder, name, [job.record for job in jobs])
        left = [job for job in jobs if not manifest.has(job.file)]
        console = Console(stderr=True)
        there = len(jobs) - len(left)
        with Progress(len(jobs), start=there, unit="image", console=console) as progress:
            drawn = _draw(pipeline, left, manifest, progress, there, tell)
        manifest.close()
        print(folder / MANIFEST)
        if there:
            print(f"{there} images were there already.")
    print(f"{drawn} images in {time.perf_counter() - start:.1f} s, compile included.")
    if bad_lines:
        print(
            f"{len(bad_lines)} of {len(rows) + len(bad)} rows of {name} could not be drawn, as "
            "told above: repair them and start again.",
            file=sys.stderr,
        )
    return len(bad_lines)


Tell = Callable[[BadRow], None]


def _plan(
    rows: Sequence[Row],
    given: Row,
    pipeline: Pipeline,
    options: SampleOptions,
    source: str,
    tell: Tell,
) -> list[Job]:
    """The images of all rows that can be drawn, in their order.

    Raises:
      UserError: an image that the command line names cannot be read.
    """
    jobs: dict[str, Job] = {}
    opened = functools.cache(open_input)
    for path in (given.image, given.mask):
        if path is not None:
            opened(path)  # a mistake on the command line is none of the rows'
    for row in rows:
        try:
            settings = settle(row, given, pipeline, options.decode_by, opened=opened)
            last = LARGEST_SEED - options.num_images + 1
            if settings.seed > last:
                raise UserError(f"seed is {settings.seed}: expected a number from 0 to {last}.")
            new = [
                _job(row, settings, copy, options.num_images, pipeline, source)
                for copy in range(options.num_images)
            ]
            taken = next((jobs[job.file] for job in new if job.file in jobs), None)
            if taken:
                raise UserError(
                    f"its file {taken.file} is that of line {taken.line}: give it another name."
                )
        except UserError as error:
            tell(BadRow(row.line, str(error)))
            continue
        jobs |= {job.file: job for job in new}
        if pipeline.truncated(row.prompt):
            print(
                f"{source}, line {row.line}: the prompt is longer than the "
                f"{pipeline.tokenizer.length} tokens that the text encoder takes: its end is cut "
                "off.",
                file=sys.stderr,
            )
    return list(jobs.values())


def _job(
    row: Row, settings: ImageSettings, copy: int, copies: int, pipeline: Pipeline, source: str
) -> Job:
    settings = dataclasses.replace(settings, seed=settings.seed + copy)
    stem = slug(row.name or "", otherwise=f"{row.number:04d}")
    which = f"-{copy}" if copies > 1 else ""
    file = f"{stem}{which}-{slug(row.prompt)}.png"
    record = {
        "prompts": source,
        "row": row.number,
        "file": file,
        "prompt": row.prompt,
        "seed": settings.seed,
        "settings": as_set(settings),
        "details": details(settings, pipeline),
        "model": pipeline.config.name,
        "model_fingerprint": pipeline.fingerprint,
    }
    return Job(row.line, file, settings, record)


def batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs that one call draws, those that one compiled loop draws after one another.

    Larger sizes come later: if memory does not last for them, the others are there. Else the
    order of the first of each kind is kept, and within each kind that of the rows.
    """
    groups: dict[Any, dict[Any, list[Job]]] = {}
    for job in jobs:
        calls = groups.setdefault(job.settings.shape_group, {})
        calls.setdefault(job.settings.batch_group, []).append(job)
    # A key of a group starts with the solver and the size.
    ordered = sorted(groups.items(), key=lambda group: math.prod(group[0][1]))
    for group in itertools.chain.from_iterable(calls.values() for _, calls in ordered):
        size = images_at_a_time(*group[0].settings.size)
        for i in range(0, len(group), size):
            yield group[i : i + size]


def _draw(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    manifest: Manifest,
    progress: Progress,
    there: int,
    tell: Tell,
) -> int:
    """Draws jobs and writes each batch as soon as it is there; returns how many could be drawn."""
    drawn, shown, compiled = 0, there, set()
    for batch in batches(jobs):
        start = time.perf_counter()
        images = _try(pipeline, batch)
        seconds = (time.perf_counter() - start) / len(batch)
        before = drawn
        for job, image in zip(batch, images, strict=True):
            if isinstance(image, UserError):
                tell(BadRow(job.line, str(image)))
                continue
            data = pictures.png_bytes(image, png_text(job.settings, pipeline))
            manifest.add(job.record, data, seconds)
            drawn += 1
        there += len(batch)
        if drawn == before:
            continue  # what takes no time would spoil the rate
        rate = (drawn - before) / (time.perf_counter() - start)
        group = batch[0].settings.shape_group  # whose first batch compiles
        progress.update(there, images_per_s=rate if group in compiled else None)
        compiled.add(group)
        shown = there
    if shown < there:
        progress.update(there)
    return drawn


def _try(pipeline: Pipeline, batch: Sequence[Job]) -> Sequence[np.ndarray | UserError]:
    """An image of each job, or why it cannot be drawn, which may be the fault of one alone."""
    try:
        return list(draw_together(pipeline, [job.settings for job in batch]))
    except UserError as error:
        if len(batch) == 1:
            return [error]
        return [image for job in batch for image in _try(pipeline, [job])]
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        width, height = batch[0].settings.size
        reason = f"there is not enough memory to draw {width}x{height}: choose a smaller size."
        return [UserError(reason) for _ in batch]
