"""`jaxdiff sample`: prompts to image files."""

import contextlib
import dataclasses
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import cast

import jax
import numpy as np
from etils import epath

from jaxdiff.cli.generate.options import (
    SampleOptions,
    make_preview,
    open_pipeline,
    prompt_warnings,
    summary,
)
from jaxdiff.cli.generate.prompt_file import slug
from jaxdiff.cli.progress import show_progress
from jaxdiff.config.fields import flag
from jaxdiff.distributed.multihost import is_host0
from jaxdiff.errors import UserError
from jaxdiff.io import images as pictures
from jaxdiff.io.files import write_whole
from jaxdiff.io.image_files import Format, image_bytes, read_image_text
from jaxdiff.io.lock import output_folder
from jaxdiff.io.terminal import write_line
from jaxdiff.pipelines.flops import SamplingSpeed
from jaxdiff.pipelines.generate import Generated, generate, snapshots
from jaxdiff.pipelines.image_metadata import ImageMetadata, file_text
from jaxdiff.pipelines.inputs import UnknownWordWarning
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.resolve import ResolvedSettings, resolve_settings
from jaxdiff.pipelines.settings import GenerationSettings

_NAMED = 5  # missing images that a message names


def sample_images(options: SampleOptions) -> None:
    """Generate images for the options, write them to a folder, and print their paths.

    Raises:
      UserError: no model, no prompt, or settings that do not fit the model.
      SystemExit: with status 1, if rows of a prompt file are invalid, or a reproduced image has
        other pixels.
    """
    if options.words:
        print_words(options)
        return
    with warnings.catch_warnings(), jax.log_compiles(options.verbose), _logging(options.quiet):
        # The command prints its own warnings, with the line of the prompt.
        warnings.simplefilter("ignore", Warning if options.quiet else UnknownWordWarning)
        warnings.showwarning = lambda message, *_, **__: write_line(message, stderr=True)
        succeeded = _sample(options)
    if not succeeded:
        sys.exit(1)


@contextlib.contextmanager
def _logging(quiet: bool) -> Iterator[None]:
    """Drop log records below errors within the context if `quiet`."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING if quiet else before)
    try:
        yield
    finally:
        logging.disable(before)


def _sample(options: SampleOptions) -> bool:
    if options.prompts is not None:
        from jaxdiff.cli.generate.batch_generate import generate_file

        return generate_file(options) == 0
    if not is_host0():
        return True  # the first process generates all
    if options.again is not None:
        return reproduce(options)
    generate_prompts(options)
    return True


def print_words(options: SampleOptions) -> None:
    """Print the words that the model knows.

    Raises:
      UserError: the model has no list of words.
    """
    words = open_pipeline(options).vocabulary
    if words is None:
        raise UserError(
            f"{options.model} has no list of known words: expected a model that was trained on a "
            "small vocabulary; use any words with this one."
        )
    write_line(" ".join(sorted(words)))


def generate_prompts(options: SampleOptions) -> None:
    """Generate the prompts of the command line: `OUT/0000-the-prompt.png` ... and `OUT/grid.png`.

    Raises:
      UserError: no model, no prompt, or settings that do not fit the model.
    """
    if not options.prompt:
        raise UserError("There is no prompt: give at least one, or a prompt file with --prompts.")
    with output_folder(options.out) as folder:
        _generate_prompts(options, folder)


def _generate_prompts(options: SampleOptions, folder: epath.Path) -> None:
    start = time.perf_counter()
    pipe = open_pipeline(options)
    said: set[str] = set()
    for prompt in () if options.quiet else options.prompt:
        for warning in prompt_warnings(pipe, prompt, f"The prompt {prompt[:200]!r}", said):
            write_line(warning, stderr=True)
    settings = [
        copy
        for one in _settings(options)
        for copy in resolve_settings(one, pipe, options.command_defaults, called=flag).copies(
            options.num_images
        )
    ]
    files = [f"{i:04d}-{slug(one.prompt)}.{options.format}" for i, one in enumerate(settings)]
    speed = SamplingSpeed(pipe)
    images, settings = _generate(pipe, settings, options, folder, files, speed)
    if options.interpolate:
        _save_interpolation(folder, images)
    else:
        _save_grid(folder, images, [one.prompt for one in settings])
    if options.strip:
        with show_progress("Sampling the strip", quiet=options.quiet):
            estimates = snapshots(pipe, settings, options.strip)
        _save_png(folder / "strip.png", pictures.strip(estimates))
    if not options.quiet:
        seconds = time.perf_counter() - start
        write_line(summary(len(images), seconds, speed.text()))


def _generate(
    pipe: Pipeline,
    settings: list[ResolvedSettings],
    options: SampleOptions,
    folder: epath.Path,
    files: list[str],
    speed: SamplingSpeed | None = None,
) -> Generated:
    """Generate images of one size, as many at a time as all devices take at once.

    Those of a time are written before the next are generated; their paths are printed at the end.

    Raises:
      UserError: an image cannot be written; names it and those that were to follow.
    """
    size = pipe.batch_size(*settings[0].size) * len(pipe.devices)
    preview = make_preview(options, pipe, folder)
    made, written = [], 0
    try:
        with show_progress("Sampling", len(settings), quiet=options.quiet) as advance:
            for i in range(0, len(settings), size):
                start = time.perf_counter()
                made.append(generate(pipe, settings[i : i + size], preview=preview))
                if speed is not None:
                    speed.add(settings[i : i + size], time.perf_counter() - start)
                for image, used in zip(*made[-1], strict=True):
                    _save(folder, files[written:], image, file_text(used, pipe))
                    written += 1
                advance(len(made[-1].images))
    finally:
        for file in files[:written]:
            write_line(folder / file)
    images = np.concatenate([one.images for one in made])
    return Generated(images, [used for one in made for used in one.settings])


def _settings(options: SampleOptions) -> list[GenerationSettings]:
    """Return the settings of each prompt, or of each interpolation between two."""
    shared = options.settings
    if not options.interpolate:
        return [dataclasses.replace(shared, prompt=prompt) for prompt in options.prompt]
    prompt, other = options.prompt
    fractions = np.linspace(0, 1, options.interpolate).tolist()
    return [dataclasses.replace(shared, prompt=prompt, mix_prompt=other, mix=f) for f in fractions]


def _save(folder: epath.Path, files: list[str], image: np.ndarray, text: dict[str, str]) -> None:
    """Write the first of some files; if that fails, name all."""
    path = folder / files[0]
    data = image_bytes(image, text, cast(Format, path.suffix[1:]))
    try:
        write_whole(path, data)
    except UserError as error:
        more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
        raise UserError(
            f"{str(error).removesuffix('.')}; images that are missing: "
            f"{', '.join(files[:_NAMED])}{more}."
        ) from error


def _save_png(path: epath.Path, picture: pictures.Picture) -> None:
    pictures.save_png(path, picture)
    write_line(path)


def _save_grid(folder: epath.Path, images: np.ndarray, prompts: Sequence[str]) -> None:
    """Write the first images with their prompts, small ones enlarged."""
    shown, side = images[: pictures.LARGEST_GRID], max(images.shape[1:3])
    scale = 2 if side <= pictures.ENLARGED_SIDE else 1
    _save_png(folder / "grid.png", pictures.prompt_grid(shown, prompts[: len(shown)], scale))


def _save_interpolation(folder: epath.Path, images: np.ndarray) -> None:
    """Write the images as a strip, and as an animation that plays forward and backward."""
    _save_png(folder / "interpolation.png", pictures.grid(images, columns=len(images)))
    path = folder / "interpolation.webp"
    write_whole(path, pictures.animation_bytes(images, "webp", seconds=0.12))
    write_line(path)


def reproduce(options: SampleOptions) -> bool:
    """Generate an image again from the text of its file, as `OUT/NAME-again.png`.

    Returns:
      Whether its pixels are the same.

    Raises:
      UserError: the file has no settings, or belongs to another model or image.
    """
    file = epath.Path(str(options.again))
    metadata = ImageMetadata.parse(file, read_image_text(file))
    before = pictures.read_picture(file)
    with output_folder(options.out) as folder:
        image = _generate_again(metadata, file, options, folder)
    return _is_same(before, image, file, metadata)


def _generate_again(
    metadata: ImageMetadata, file: epath.Path, options: SampleOptions, folder: epath.Path
) -> np.ndarray:
    details = metadata.details
    pipe = open_pipeline(options, dtype=details.get("dtype"), quantize=details.get("quantize"))
    settings = metadata.resolve(pipe, options.settings, options.command_defaults)
    kind = "webp" if file.suffix.lower() == ".webp" else "png"
    (image,), _ = _generate(pipe, [settings], options, folder, [f"{file.stem}-again.{kind}"])
    return image


def _is_same(
    before: np.ndarray, image: np.ndarray, file: epath.Path, metadata: ImageMetadata
) -> bool:
    """Print and return whether the pixels are the same."""
    if before.shape != image.shape:
        write_line(f"Not the same pixels: {file} was resized after it was generated.")
        return False
    difference = np.abs(image.astype(int) - before)
    if difference.any():
        write_line(
            f"Not the same pixels: they differ by up to {difference.max()} of 255, in "
            f"{(difference > 0).mean():.1%} of the values. The first was generated on "
            f"{metadata.details.get('device')} with JAX {metadata.details.get('jax')}: another "
            "device or version rounds differently."
        )
        return False
    write_line("The same pixels.")
    return True
