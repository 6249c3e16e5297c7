"""`sample.py` and `jaxdiff sample`: prompts to image files."""

import dataclasses
import sys
import time

import numpy as np
from etils import epath

from jaxdiff.cli.generate.batch_generate import draw_file
from jaxdiff.cli.generate.generate import draw_together, snapshots
from jaxdiff.cli.generate.image_files import Format, image_bytes
from jaxdiff.cli.generate.image_metadata import file_text, read_told, settings_told
from jaxdiff.cli.generate.options import (
    SampleOptions,
    check,
    defaults,
    fixed,
    open_pipeline,
    preview,
)
from jaxdiff.cli.generate.prompt_file import Row, slug
from jaxdiff.cli.generate.settings import ImageSettings, settle
from jaxdiff.distributed.multihost import is_host0
from jaxdiff.errors import UserError
from jaxdiff.io import images as pictures
from jaxdiff.io.files import write_whole
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.load import make_folder


def draw(options: SampleOptions) -> None:
    """Draws what the options ask for, writes it to a folder, and prints where.

    Raises:
      UserError: no model, no prompt, or settings that do not fit the model.
      SystemExit: with status 1, if some rows of a file could not be drawn, or an image that was
        drawn again has other pixels.
    """
    check(options)
    if options.prompts is not None:
        fine = draw_file(options) == 0
    elif not is_host0():
        fine = True  # what is little, the first process draws
    elif options.again is not None:
        fine = draw_again(options)
    else:
        draw_prompts(options)
        fine = True
    if not fine:
        sys.exit(1)


def draw_prompts(options: SampleOptions) -> None:
    """Draws the prompts of the command line: `OUT/0000-the-prompt.png` ... and `OUT/grid.png`.

    Raises:
      UserError: no model, no prompt, or settings that do not fit the model.
    """
    if not options.prompt:
        raise UserError("There is no prompt: give at least one, or a file of them with --prompts.")
    start = time.perf_counter()
    given = defaults(options)
    folder = make_folder(options.out)
    pipeline = open_pipeline(options)
    for prompt in options.prompt:
        if pipeline.truncated(prompt):
            print(
                f"The prompt {prompt!r} is longer than the {pipeline.tokenizer.length} tokens that "
                "the text encoder takes: its end is cut off."
            )
    settings = [
        copy
        for row in _rows(options, given)
        for copy in settle(row, given, pipeline, fixed(options)).copies(options.num_images)
    ]
    look = preview(options, pipeline, folder)
    images, settings = draw_together(pipeline, settings, preview=look)
    for i, (one, image) in enumerate(zip(settings, images, strict=True)):
        _save(folder / f"{i:04d}-{slug(one.prompt)}", image, one, pipeline, options.format)
    captions = [one.prompt for one in settings] if images.shape[2] >= 48 else None
    if options.between:
        _save_between(folder, images)
    else:
        pictures.save_png(folder / "grid.png", pictures.grid(images, captions=captions, scale=2))
        print(folder / "grid.png")
    if options.strip:
        estimates = snapshots(pipeline, settings, options.strip)
        pictures.save_png(folder / "strip.png", pictures.strip(estimates))
        print(folder / "strip.png")
    print(f"{len(images)} images in {time.perf_counter() - start:.1f} s, compile included.")


def _rows(options: SampleOptions, given: Row) -> list[Row]:
    """What the command line says as rows, one for each prompt, or for each share of two."""
    if not options.between:
        return [dataclasses.replace(given, prompt=prompt) for prompt in options.prompt]
    prompt, toward = options.prompt
    shares = np.linspace(0, 1, options.between).tolist()
    return [dataclasses.replace(given, prompt=prompt, toward=toward, share=s) for s in shares]


def _save(
    stem: epath.Path, image: np.ndarray, settings: ImageSettings, pipeline: Pipeline, kind: Format
) -> epath.Path:
    path = stem.parent / f"{stem.name}.{kind}"
    write_whole(path, image_bytes(image, file_text(settings, pipeline), kind))
    print(path)
    return path


def _save_between(folder: epath.Path, images: np.ndarray) -> None:
    """The way from one prompt to another as a strip, and as a film there and back."""
    pictures.save_png(folder / "between.png", pictures.grid(images, columns=len(images)))
    write_whole(folder / "between.webp", pictures.animation_bytes(images, "webp", seconds=0.12))
    for name in ("between.png", "between.webp"):
        print(folder / name)


def draw_again(options: SampleOptions) -> bool:
    """Draws an image again from the text of its file, as `OUT/NAME-again.png`.

    Returns:
      Whether its pixels are the same.

    Raises:
      UserError: the file does not say how it was made, or another model or image made it.
    """
    file = epath.Path(str(options.again))
    told = read_told(file)
    then = pictures.read_picture(file)
    given = defaults(options)
    folder = make_folder(options.out)
    options = dataclasses.replace(options, seamless=told.seamless)
    pipeline = open_pipeline(options, dtype=told.details.get("dtype"))
    settings = settings_told(file, told, pipeline, given, fixed(options))
    (image,), _ = draw_together(pipeline, [settings])
    kind = "webp" if file.suffix.lower() == ".webp" else "png"
    _save(folder / f"{file.stem}-again", image, settings, pipeline, kind)
    if then.shape != image.shape:
        print(f"Not the same pixels: {file} was resized after it was drawn.")
        return False
    apart = np.abs(image.astype(int) - then)
    if apart.any():
        print(
            f"Not the same pixels: they differ by up to {apart.max()} of 255, in "
            f"{(apart > 0).mean():.1%} of the values. The first was drawn on "
            f"{told.details.get('device')} with JAX {told.details.get('jax')}: another device or "
            "version rounds otherwise."
        )
        return False
    print("The same pixels.")
    return True
