"""`jaxdiff sample --prompts FILE`: thousands of prompts, few compilations, resumable."""

import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from jaxdiff.cli.generate.manifest import MANIFEST, Manifest, Record
from jaxdiff.cli.generate.options import (
    SampleOptions,
    make_preview,
    open_pipeline,
    prompt_warnings,
    summary,
)
from jaxdiff.cli.generate.prompt_file import BadRow, PromptRow, read_prompts, slug
from jaxdiff.cli.progress import line_console
from jaxdiff.distributed.multihost import held_on_host0, is_host0, sum_over_hosts
from jaxdiff.errors import UserError
from jaxdiff.io import images as pictures
from jaxdiff.io.files import make_folder
from jaxdiff.io.image_files import Format, image_bytes
from jaxdiff.io.lock import lock_folder
from jaxdiff.io.terminal import printable, write_line
from jaxdiff.pipelines.batching import Preview
from jaxdiff.pipelines.flops import SamplingSpeed
from jaxdiff.pipelines.generate import generate
from jaxdiff.pipelines.image_metadata import file_text, record
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.resolve import (
    FILES,
    ResolvedSettings,
    input_paths,
    open_input,
    resolve_settings,
)
from jaxdiff.pipelines.settings import Varies
from jaxdiff.training.metrics import Progress


class Job(NamedTuple):
    """One image to generate."""

    line: int
    file: str
    settings: ResolvedSettings
    record: Record


class RowErrors:
    """Prints the errors of invalid rows, and counts them."""

    def __init__(self, name: str):
        self._name = name
        self._shared: set[int] = set()
        self._own: set[int] = set()

    def add_shared(self, row: BadRow) -> None:
        """Add a row that every process finds invalid."""
        self._shared.add(row.line)
        if is_host0():
            self._print(row)

    def add_own(self, row: BadRow) -> None:
        """Add a row that failed in the process that generates it."""
        self._own.add(row.line)
        self._print(row)

    def _print(self, row: BadRow) -> None:
        write_line(f"{self._name}, line {row.line}: {row.reason}", stderr=True)

    def count(self) -> int:
        """Return the number of rows over all processes."""
        return len(self._shared) + sum_over_hosts(len(self._own - self._shared))


def generate_file(options: SampleOptions) -> int:
    """Generate the missing images of a prompt file; return the number of invalid rows.

    Each process generates a part, and all return the same number.

    Raises:
      UserError: the file or the model cannot be read.
    """
    start = time.perf_counter()
    file = str(options.prompts)
    name = printable(epath.Path(file).name)
    rows, bad = read_prompts(file)
    errors = RowErrors(name)
    for row in bad:
        errors.add_shared(row)
    generated, speed = 0, ""
    if rows:
        folder = make_folder(options.out)
        with held_on_host0(lock_folder(folder)):
            generated, speed = _generate_rows(rows, folder, options, name, errors)
    if not options.quiet:
        seconds = time.perf_counter() - start
        write_line(summary(generated, seconds, speed))
    count = errors.count()
    if count and is_host0():
        write_line(
            f"{count} of {len(rows) + len(bad)} rows of {name} have no image, for the reasons "
            "above: correct them and start again.",
            stderr=True,
        )
    return count


def _generate_rows(
    rows: Sequence[PromptRow],
    folder: epath.Path,
    options: SampleOptions,
    name: str,
    errors: RowErrors,
) -> tuple[int, str]:
    """Generate this process's part of the missing images; return their number and the speed."""
    process, processes = jax.process_index(), jax.process_count()
    pipe = open_pipeline(options)
    jobs = _plan(rows, pipe, options, name, errors)
    records = [job.record for job in jobs]
    manifest = None
    if process == 0:
        manifest = Manifest(folder, name, records, processes=processes)
    _wait_for_all("the manifest is in order")
    if manifest is None:
        manifest = Manifest(folder, name, records, process=process, processes=processes)
    # In the order of the calls: every process gets the same number of each kind.
    ordered = [job for call in calls(jobs, pipe, 1) for job in call]
    mine = ordered[process::processes]
    missing = [job for job in mine if not manifest.has(job.file)]
    there = len(mine) - len(missing)
    preview, speed = make_preview(options, pipe, folder), SamplingSpeed(pipe)
    run = _Run(pipe, manifest, errors, options.format, preview, speed)
    console = line_console(quiet=options.quiet, verbose=options.verbose)
    with Progress(len(mine), start=there, unit="image", console=console) as progress:
        generated = run.generate(missing, progress, there)
    _wait_for_all("all images are there")
    manifest.close()
    if process == 0:
        write_line(folder / MANIFEST)
        if options.grid:
            _save_grids(folder, jobs)
    if there and not options.quiet:
        write_line(f"{there} images were there already.")
    return generated, speed.text()


def _wait_for_all(where: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _save_grids(folder: epath.Path, jobs: Sequence[Job]) -> None:
    """Write `grid.png`, or `grid-WIDTHxHEIGHT.png` for each size where there are several."""
    sizes: dict[tuple[int, int], list[Job]] = {}
    for job in jobs:
        if (folder / job.file).exists():  # an image may have failed
            sizes.setdefault(job.settings.final_size, []).append(job)
    for (width, height), some in sizes.items():
        shown = some[: pictures.LARGEST_GRID]
        images = np.stack([pictures.read_picture(folder / job.file) for job in shown])
        prompts = [job.settings.prompt for job in shown]
        which = f"-{width}x{height}" if len(sizes) > 1 else ""
        path = folder / f"grid{which}.png"
        pictures.save_png(path, pictures.prompt_grid(images, prompts))
        write_line(path)


def _plan(
    rows: Sequence[PromptRow],
    pipe: Pipeline,
    options: SampleOptions,
    source: str,
    errors: RowErrors,
) -> list[Job]:
    """Return the images of all valid rows, in their order.

    Raises:
      UserError: an image that the command line names cannot be read.
    """
    jobs: dict[str, Job] = {}
    said: set[str] = set()
    shared, opened = options.settings, functools.cache(open_input)
    for name in FILES:
        for path in input_paths(shared, name):
            opened(path, name == "mask")  # an error of the command line, not of a row
    for row in rows:
        try:
            settings = resolve_settings(
                row.settings, pipe, options.command_defaults, defaults=shared, opened=opened
            )
            copies = settings.copies(options.num_images)
            new = [_job(row, copy, i, options, pipe, source) for i, copy in enumerate(copies)]
            taken = next((jobs[job.file] for job in new if job.file in jobs), None)
            if taken:
                raise UserError(
                    f"its file {taken.file} is that of line {taken.line}: give it another name."
                )
        except UserError as error:
            errors.add_shared(BadRow(row.line, str(error)))
            continue
        jobs |= {job.file: job for job in new}
        where = f"{source}, line {row.line}: the prompt"
        if is_host0() and not options.quiet:
            for warning in prompt_warnings(pipe, row.settings.prompt, where, said):
                write_line(warning, stderr=True)
    return list(jobs.values())


def _job(
    row: PromptRow,
    settings: ResolvedSettings,
    copy: int,
    options: SampleOptions,
    pipe: Pipeline,
    source: str,
) -> Job:
    stem = slug(row.settings.name or "", otherwise=f"{row.number:04d}")
    which = f"-{copy}" if options.num_images > 1 else ""
    file = f"{stem}{which}-{slug(row.settings.prompt)}.{options.format}"
    made = {"prompts": source, "row": row.number, "file": file, **record(settings, pipe)}
    return Job(row.line, file, settings, made)


def calls(jobs: Sequence[Job], pipe: Pipeline, devices: int) -> Iterator[list[Job]]:
    """Yield jobs by call of the pipeline, grouped by compiled program.

    Larger images come later: if they exceed the memory, the others exist. Within a program jobs are
    ordered by steps, then rows.
    """
    programs: dict[Any, dict[Any, list[Job]]] = {}
    for job in jobs:
        some = programs.setdefault(job.settings.group(Varies.PROGRAM), {})
        some.setdefault(job.settings.group(Varies.CALL), []).append(job)
    ordered = sorted(
        programs.values(),
        key=lambda some: math.prod(next(iter(some.values()))[0].settings.final_size),
    )
    for group in itertools.chain.from_iterable(some.values() for some in ordered):
        size = pipe.batch_size(*group[0].settings.size)
        kinds: dict[Any, list[Job]] = {}
        for job in sorted(group, key=lambda job: job.settings.settings.num_steps or 0):
            kinds.setdefault(job.settings.group(Varies.BATCH), []).append(job)
        # A batch of one device takes one number of steps.
        some = [kind[i : i + size] for kind in kinds.values() for i in range(0, len(kind), size)]
        for i in range(0, len(some), devices):
            yield list(itertools.chain.from_iterable(some[i : i + devices]))


class _Run(NamedTuple):
    """Objects that all calls of a command share."""

    pipe: Pipeline
    manifest: Manifest
    errors: RowErrors
    format: Format
    preview: Preview | None
    speed: SamplingSpeed

    def generate(self, jobs: Sequence[Job], progress: Progress, there: int) -> int:
        """Generate jobs, write those of each call at once, and return how many succeeded."""
        total, shown, compiled = 0, there, set()
        for call in calls(jobs, self.pipe, len(self.pipe.devices)):
            start = time.perf_counter()
            images = self._try(call)
            seconds = (time.perf_counter() - start) / len(call)
            written = sum(
                self._write(job, one, seconds) for job, one in zip(call, images, strict=True)
            )
            total, there = total + written, there + len(call)
            if not written:
                continue  # failures would distort the rate
            self.speed.add([job.settings for job in call], seconds * len(call))
            rate = written / (time.perf_counter() - start)
            program = call[0].settings.group(Varies.PROGRAM)  # compiled by its first call
            progress.update(there, images_per_s=rate if program in compiled else None)
            compiled.add(program)
            shown = there
        if shown < there:
            progress.update(there)
        return total

    def _write(
        self, job: Job, image: tuple[np.ndarray, ResolvedSettings] | UserError, seconds: float
    ) -> bool:
        """Write an image and its line, or report its error."""
        try:
            if isinstance(image, UserError):
                raise image
            pixels, settings = image
            data = image_bytes(pixels, file_text(settings, self.pipe), self.format)
        except UserError as error:
            self.errors.add_own(BadRow(job.line, str(error)))
            return False
        more: dict[str, Any] = {}
        if job.settings.settings.best_of:
            more["chosen_seed"] = settings.seed
        if unknown := self.pipe.unknown_words(job.settings.prompt):
            more["unknown_words"] = unknown
        self.manifest.add(job.record, data, seconds, **more)
        return True

    def _try(
        self, call: Sequence[Job]
    ) -> Sequence[tuple[np.ndarray, ResolvedSettings] | UserError]:
        """Return an image or an error of each job; retry the jobs of a failing call one by one."""
        try:
            made = generate(self.pipe, [job.settings for job in call], preview=self.preview)
            return list(zip(*made, strict=True))
        except UserError as error:
            if len(call) == 1:
                return [error]
            return [one for job in call for one in self._try([job])]
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            is_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
            if not is_memory:
                raise
            width, height = call[0].settings.final_size
            reason = f"there is not enough memory for {width}x{height}: choose a smaller size."
            return [UserError(reason) for _ in call]
