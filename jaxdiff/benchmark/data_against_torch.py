"""Times the input pipeline beside torch's DataLoader: the same files, the same work, in turn.

    pip install torch==2.13.0 && pip install -e '.[parity]'
    python -m jaxdiff.benchmark.data_against_torch

JPEGs of 500 x 375 pixels are decoded, cropped and resized to 256; latents of 512 pixels, mean and
variance in float16, are read; captions are tokenized. Each takes its turns in this process alone,
and by its processor time, so that whatever else the machine does slows neither.
"""

import dataclasses
import io
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import tyro
from etils import epath
from PIL import Image

from jaxdiff.benchmark.pipeline_rate import (
    CAPTION,
    DataFigures,
    measure,
    measure_data,
    small_tokenizer,
    write_photographs,
)
from jaxdiff.data.array_record import ArrayRecord, write_encoded
from jaxdiff.data.cached_latents import CachedLatents, encode_latents
from jaxdiff.data.pipeline import DataConfig
from jaxdiff.data.shards import LatentSpace, Manifest, Shard
from jaxdiff.data.transforms import Transforms

SIZE, LATENT, TIMES = 256, 64, 256

FILE = "records.array_record"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    records: int = 512
    """Of each kind; an epoch has them 256 times, as many as a data set has."""
    batch_size: int = 64
    """Images of a batch."""
    seconds: float = 5.0
    """Of each turn."""
    repeats: int = 3
    """Turns that each takes."""


class _Torch(torch.utils.data.Dataset):
    """The usual data set: one record made ready at a time."""

    def __init__(self, source: ArrayRecord | CachedLatents, ready: Callable[[Any], np.ndarray]):
        self._source, self._ready = source, ready

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        record = self._source[index]
        return torch.from_numpy(self._ready(record)), record["captions"][0]


def main(options: Options) -> None:
    """Prints a line for each contender."""
    with tempfile.TemporaryDirectory() as folder:
        photographs = epath.Path(folder) / "photographs"
        photographs.mkdir()
        write_photographs(str(photographs / FILE), options.records)
        _write_manifest(photographs, options.records, None)
        latents = _write_latents(epath.Path(folder) / "latents", options.records)
        transforms = Transforms(size=SIZE)
        contenders = {
            "JPEG at 256": (
                DataConfig(source=ArrayRecord(path=str(photographs)), transforms=transforms),
                _cropped,
            ),
            "cached latents of 512": (
                DataConfig(source=latents, transforms=Transforms(size=8 * LATENT)),
                lambda record: record["moments"][0].copy(),
            ),
        }
        for name, (data, ready) in contenders.items():
            _compare(name, data, _Torch(data.source, ready), options)


def _compare(name: str, data: DataConfig, theirs: _Torch, options: Options) -> None:
    figures: dict[str, list[DataFigures]] = {"jaxdiff": [], "torch": []}
    batch, seconds = options.batch_size, options.seconds
    for _ in range(options.repeats):
        figures["jaxdiff"].append(measure_data(data, seconds=seconds, batch_size=batch))
        figures["torch"].append(measure(_batches(theirs, batch), batch, seconds))
    rates = {
        who: statistics.median(f.images_per_s_per_core or 0.0 for f in found)
        for who, found in figures.items()
    }
    for who, rate in rates.items():
        ratio = rate / rates["torch"]
        print(f"{name}, {who}: {rate:.0f} images/s per core, {ratio:.2f} of torch's")


def _write_latents(folder: epath.Path, count: int) -> CachedLatents:
    folder.mkdir()
    rng, size = np.random.default_rng(0), 8 * LATENT

    def records() -> Iterator[bytes]:
        for i in range(count):
            moments = rng.normal(size=(1, LATENT, LATENT, 8)).astype(np.float16)
            framing = np.array([[size, size, 0, 0, size, size]], np.int32)
            yield encode_latents(
                {"moments": moments, "framing": framing, "captions": [CAPTION], "name": str(i)}
            )

    write_encoded(str(folder / FILE), records())
    space = LatentSpace(
        autoencoder="", dtype="float16", views=1, shapes=[[size, size]], crop="center", flip=False
    )
    _write_manifest(folder, count, space)
    return CachedLatents(path=str(folder))


def _write_manifest(folder: epath.Path, count: int, space: LatentSpace | None) -> None:
    """One shard, time and again: of few records an order is slow to find, as of no real data."""
    size = (folder / FILE).stat().length
    shard = Shard(file=FILE, records=count, bytes=size, sha256="")
    Manifest(made_of={}, latents=space, shards=[shard] * TIMES).write(folder)


def _batches(dataset: _Torch, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    tokenizer = small_tokenizer()

    def collate(records: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        images, captions = zip(*records, strict=True)
        return torch.stack(images), torch.from_numpy(tokenizer(list(captions)))

    loader = torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )
    while True:
        yield from loader


def _cropped(record: Any) -> np.ndarray:
    """The shorter side to 256, then the middle, as torchvision's transforms do it with Pillow."""
    image = Image.open(io.BytesIO(record["image"])).convert("RGB")
    scale = SIZE / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return np.array(image.crop((left, top, left + SIZE, top + SIZE)))


if __name__ == "__main__":
    main(tyro.cli(Options))
