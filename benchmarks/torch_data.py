"""The input pipeline and torch's DataLoader on the same files, timed in turns.

JPEGs of 500 x 375 pixels are decoded, cropped and resized to 256. Latents of 512 pixels, mean and
variance in float16, are read. Captions are tokenized. Both run in this process alone and are
measured in CPU time, which other load on the machine does not affect.
"""

import functools
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from etils import epath
from PIL import Image

from jaxdiff.benchmark import synthetic
from jaxdiff.benchmark.report import Measurement
from jaxdiff.benchmark.timing import median, time_in_turns
from jaxdiff.data.loader import DataConfig, make_dataset
from jaxdiff.data.shards import LatentSpace, Shard, ShardManifest
from jaxdiff.data.sources.array_record import ArrayRecord, write_array_record, write_encoded
from jaxdiff.data.sources.base import Record
from jaxdiff.data.sources.cached_latents import CachedLatents, encode_latents
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.data.transforms import Transforms
from jaxdiff.training.recipe import Config

RECORDS, CAPTION = 256, "a photograph of something in front of something else"
WIDTH, HEIGHT, SIZE, LATENT = 500, 375, 256, 64


def measure(config: Config, *, warmup: int, repeats: int) -> list[Measurement]:
    """CPU seconds of batches with the recipe's batch size and caption length."""
    images = config.train.batch_size
    (tokenizer,) = set(synthetic.small_tokenizers(config).values())
    with tempfile.TemporaryDirectory() as folder:
        work = {
            "JPEG at 256": (_photographs(epath.Path(folder)), SIZE, _cropped),
            "latents of 512": (_latents(epath.Path(folder)), 8 * LATENT, _first_view),
        }
        batches: dict[str, Iterator[Any]] = {}
        for name, (source, size, prepare) in work.items():
            data = DataConfig(source=source, transforms=Transforms(size=size), shuffle=False)
            dataset = make_dataset(data, tokenizer, batch_size=images, seed=0)
            batches[f"{name}, jaxdiff"] = iter(dataset)
            batches[f"{name}, torch"] = _batches(_TorchDataset(source, prepare), tokenizer, images)
        turns = {name: functools.partial(next, one) for name, one in batches.items()}
        found = time_in_turns(turns, warmup=warmup, repeats=repeats, clock=time.process_time)
    return [
        Measurement(
            name=name,
            unit="batch",
            seconds=seconds,
            metrics={"images_per_s_per_core": images / median(seconds)},
            notes=["Seconds are CPU time."],
        )
        for name, seconds in found.items()
    ]


def _photographs(folder: epath.Path) -> ArrayRecord:
    """JPEGs with the size and the spectrum of photographs."""
    rng = np.random.default_rng(0)

    def photograph(i: int) -> Record:
        pixels = np.full((HEIGHT, WIDTH, 3), 128.0)
        for cells in (4, 16, 64, 256):  # amplitudes fall with the frequency, as in nature
            coarse = rng.integers(0, 256, (cells, cells, 3), np.uint8)
            layer = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels += (np.asarray(layer, float) - 128) * 2 / cells**0.5
        data = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
        return {"image": data.getvalue(), "captions": [CAPTION], "name": str(i)}

    path = str(folder / "photographs.array_record")
    write_array_record(path, map(photograph, range(RECORDS)))
    return ArrayRecord(path=path)


def _latents(folder: epath.Path) -> CachedLatents:
    rng, size, file = np.random.default_rng(0), 8 * LATENT, "latents.array_record"

    def record(i: int) -> bytes:
        moments = rng.normal(size=(1, LATENT, LATENT, 8)).astype(np.float16)
        size_crop = np.array([[size, size, 0, 0, size, size]], np.int32)
        return encode_latents(
            {
                "moments": moments,
                "text": None,
                "size_crop": size_crop,
                "captions": [CAPTION],
                "name": str(i),
                "digest": None,
            }
        )

    write_encoded(str(folder / file), map(record, range(RECORDS)))
    space = LatentSpace(
        autoencoder="",
        text=None,
        dtype="float16",
        views=1,
        shapes=[[size, size]],
        crop="center",
        flip=False,
    )
    length = (folder / file).stat().length
    shard = Shard(file=file, records=RECORDS, bytes=length, sha256="")
    ShardManifest(provenance={}, latents=space, shards=[shard], found=shard.records).write(folder)
    return CachedLatents(path=str(folder))


class _TorchDataset(torch.utils.data.Dataset):
    """A map-style data set that prepares one record at a time."""

    def __init__(self, source: ArrayRecord | CachedLatents, prepare: Callable[[Any], np.ndarray]):
        self._source, self._prepare = source, prepare

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        record = self._source[index]
        return torch.from_numpy(self._prepare(record)), record["captions"][0]


def _batches(dataset: _TorchDataset, tokenizer: TextTokenizer, batch_size: int) -> Iterator[Any]:
    def collate(records: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        images, captions = zip(*records, strict=True)
        return torch.stack(images), torch.from_numpy(tokenizer(list(captions)))

    loader = torch.utils.data.DataLoader(dataset, batch_size, drop_last=True, collate_fn=collate)
    while True:
        yield from loader


def _cropped(record: Any) -> np.ndarray:
    """Resize the shorter side to 256 and crop the centre, as torchvision does with Pillow."""
    image = Image.open(io.BytesIO(record["image"])).convert("RGB")
    scale = SIZE / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return np.array(image.crop((left, top, left + SIZE, top + SIZE)))


def _first_view(record: Any) -> np.ndarray:
    return record["moments"][0].copy()
