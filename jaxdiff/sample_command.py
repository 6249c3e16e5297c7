"""`sample.py` and `jaxdiff sample`: prompts to PNG files."""

import sys
import time

import numpy as np
from etils import epath

from jaxdiff import pictures
from jaxdiff.bundle import make_folder
from jaxdiff.errors import UserError
from jaxdiff.image_settings import (
    draw_together,
    open_input,
    png_text,
    read_told,
    settings_told,
    settle,
)
from jaxdiff.prompt_file import Row, slug
from jaxdiff.sample_file import draw_file
from jaxdiff.sample_options import SampleOptions, check, defaults, open_pipeline


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
        settle(Row(prompt=prompt, seed=options.seed + i), given, pipeline, options.decode_by)
        for prompt in options.prompt
        for i in range(options.num_images)
    ]
    images = draw_together(pipeline, settings)
    for i, (one, image) in enumerate(zip(settings, images, strict=True)):
        path = folder / f"{i:04d}-{slug(one.prompt)}.png"
        pictures.save_png(path, image, png_text(one, pipeline))
        print(path)
    captions = [one.prompt for one in settings] if images.shape[2] >= 48 else None
    pictures.save_png(folder / "grid.png", pictures.grid(images, captions=captions, scale=2))
    print(folder / "grid.png")
    if options.strip:
        snapshots = draw_together(pipeline, settings, num_snapshots=options.strip)
        pictures.save_png(folder / "strip.png", pictures.strip(snapshots))
        print(folder / "strip.png")
    print(f"{len(images)} images in {time.perf_counter() - start:.1f} s, compile included.")


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
    inputs = {
        name: open_input(path) if path else None
        for name, path in (("image", options.image), ("mask", options.mask))
    }
    folder = make_folder(options.out)
    pipeline = open_pipeline(options, dtype=told.details.get("dtype"))
    settings = settings_told(file, told, pipeline, inputs)
    (image,) = draw_together(pipeline, [settings])
    path = folder / f"{file.stem}-again.png"
    pictures.save_png(path, image, png_text(settings, pipeline))
    print(path)
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
