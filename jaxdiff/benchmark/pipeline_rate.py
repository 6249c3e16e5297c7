"""Speed of the input pipeline alone: no model, nothing on a device."""

import io
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.data.array_record import write_array_record
from jaxdiff.data.pipeline import DataConfig, make_dataset
from jaxdiff.data.source import Record
from jaxdiff.data.tokenizer import Tokenizer

CAPTION = "a photograph of something in front of something else"


@dataclass(frozen=True, kw_only=True)
class DataFigures:
    """What a pipeline gives.

    Attributes:
      images_per_s: by the clock, with all processes and threads that the recipe asks for.
      images_per_s_per_core: by the processor time of this process; None where others do the work.
      images: that were counted, after the first batches.
    """

    images_per_s: float
    images_per_s_per_core: float | None
    images: int


def measure_data(
    data: DataConfig,
    *,
    seconds: float = 5.0,
    batch_size: int = 64,
    tokenizer: Tokenizer | None = None,
) -> DataFigures:
    """Takes batches for some seconds from the pipeline of a recipe, as one host of one.

    Args:
      data: what to read, and how.
      seconds: to measure for.
      batch_size: images of a batch.
      tokenizer: a small one unless given.
    """
    tokenizer = tokenizer or small_tokenizer()
    dataset = make_dataset(data, tokenizer, batch_size=batch_size, seed=0)
    batches = iter(dataset)
    try:
        figures = measure(batches, batch_size, seconds)
    finally:
        batches.close()
    if data.workers:
        return DataFigures(
            images_per_s=figures.images_per_s, images_per_s_per_core=None, images=figures.images
        )
    return figures


def measure(batches: Iterable[Any], batch_size: int, seconds: float) -> DataFigures:
    """Of anything that gives batches; the first two are not counted."""
    rest = itertools.islice(batches, 2, None)
    next(rest)
    wall, cpu, images = time.perf_counter(), time.process_time(), 0
    for _ in rest:
        images += batch_size
        if time.perf_counter() - wall >= seconds:
            break
    return DataFigures(
        images_per_s=images / (time.perf_counter() - wall),
        images_per_s_per_core=images / (time.process_time() - cpu),
        images=images,
    )


def small_tokenizer() -> Tokenizer:
    """Of Stable Diffusion's length, for captions whose content does not matter."""
    return Tokenizer.train([CAPTION], vocab_size=600, length=77)


def write_photographs(path: str, count: int, width: int = 500, height: int = 375) -> None:
    """An ArrayRecord file of JPEGs, in size and detail about like photographs."""
    write_array_record(path, _photographs(count, width, height))


def _photographs(count: int, width: int, height: int) -> Iterator[Record]:
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = np.full((height, width, 3), 128.0)
        for cells in (4, 16, 64, 256):  # amplitudes fall with the frequency, as in nature
            coarse = rng.integers(0, 256, (cells, cells, 3), np.uint8)
            layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            pixels += (np.asarray(layer, float) - 128) * 2 / cells**0.5
        data = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
        yield {"image": data.getvalue(), "captions": [CAPTION], "name": f"photograph {i}"}
