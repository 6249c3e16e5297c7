"""Encode images and captions ahead of training, on all devices of this process."""

import io
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, PyTree, UInt8

from jaxdiff.config.serialization import types_in
from jaxdiff.data.bad_records import RecordError, Reject
from jaxdiff.data.shard_writer import Crops, RecordReader, ShardRange, Workers, write_shard
from jaxdiff.data.shards import EMPTY, LatentSpace, Shard
from jaxdiff.data.sources.cached_latents import LatentOptions, encode_latents
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.data.transforms import View
from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh
from jaxdiff.distributed.sharding import replicated
from jaxdiff.io.files import write_whole
from jaxdiff.models.autoencoders.base import AutoencoderSpec
from jaxdiff.models.conditioning import TextInputs
from jaxdiff.models.layers import bind_init, bind_params, cast
from jaxdiff.models.text_to_image import from_uint8
from jaxdiff.pretrained.load import read_tokenizers
from jaxdiff.training.cached_latents import (
    check_cachable,
    encoder_fingerprint,
    text_fingerprint,
)
from jaxdiff.training.initial_weights import load_parts
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.captions import CaptionTokenizer
from jaxdiff.training.tasks.diffusion import AUTOENCODER, DiffusionTask

_CHUNK = 16  # records that a worker reads at a time
_IN_FLIGHT = 2  # batches on the devices before the host waits for one


class LatentEncoder:
    """The encoder of an autoencoder; compiles once per image shape.

    `params` are on the host, in the compute type.
    """

    def __init__(self, autoencoder: AutoencoderSpec, params: PyTree, options: LatentOptions):
        devices = jax.local_devices()
        mesh = make_mesh(MeshConfig(), devices)
        self.batch_size = options.batch_size * len(devices)
        self._sharding = batch_sharding(mesh)
        self._params = jax.device_put(params, replicated(mesh))
        build = bind_init(type(autoencoder).build, autoencoder)

        def encode(params: PyTree, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b i j c"]:
            z = bind_params(build, params).encode(from_uint8(images))
            moments = jnp.concatenate([z.mean, z.logvar], axis=-1)
            return moments[..., : autoencoder.moment_channels].astype(options.dtype)

        self._encode = jax.jit(encode)

    def __call__(self, images: Sequence[np.ndarray]) -> Float[Array, "b i j c"]:
        """Return moments of up to `batch_size` images uint8 [h, w, 3], padded to a full batch."""
        full = np.resize(np.stack(images), (self.batch_size, *images[0].shape))
        return self._encode(self._params, jax.device_put(full, self._sharding))


class CaptionEncoder:
    """The frozen text encoders of a task.

    `params` are those of the model's frozen parts, on the host, in the compute type.
    """

    def __init__(
        self,
        task: DiffusionTask,
        params: PyTree,
        tokenizers: Mapping[str, TextTokenizer],
        options: LatentOptions,
    ):
        mesh = make_mesh(MeshConfig(), jax.local_devices())
        conditioner = task.model.conditioner
        self._size = options.batch_size * mesh.size
        self._tokenize = CaptionTokenizer(conditioner, tokenizers)
        self._sharding = batch_sharding(mesh)
        encoders = {"text_encoders": params["text_encoders"]}
        self._params = jax.device_put(encoders, replicated(mesh))
        # bfloat16, a possible compute type, has a larger range than float16.
        largest = float(jnp.finfo(options.dtype).max)

        def encode(params: PyTree, inputs: TextInputs) -> Float[Array, "b m"]:
            rows = conditioner.pack(conditioner.encode(params, inputs))
            return jnp.clip(rows.astype(jnp.float32), -largest, largest).astype(options.dtype)

        self._encode = jax.jit(encode)

    def __call__(self, captions: list[str]) -> Float[np.ndarray, "b m"]:
        """Return the features of each caption, as packed by `Conditioner.pack`."""
        rows = []
        for start in range(0, len(captions), self._size):
            part = captions[start : start + self._size]
            full = part + [""] * (self._size - len(part))
            inputs = jax.device_put(self._tokenize(full), self._sharding)
            rows.append(np.asarray(self._encode(self._params, inputs))[: len(part)])
        return np.concatenate(rows)


class Cache(NamedTuple):
    """Encoders, and the manifest's description of their latents."""

    encoder: LatentEncoder
    text: CaptionEncoder | None
    space: LatentSpace
    options: LatentOptions


def make_cache(config: Config, options: LatentOptions) -> Cache:
    """Load the encoders of the latents and text features that a recipe trains on.

    Raises:
      UserError: the recipe has no autoencoder, its text encoders are trained, or an option is out
        of range.
    """
    task, transforms = check_cachable(config.task, options), config.data.transforms
    assert task.model.autoencoder is not None
    tokenizers = None
    if options.text:
        assert task.pretrained.text_encoders is not None
        tokenizers = read_tokenizers(task.pretrained.text_encoders, types_in(config))
    parts = load_parts(
        {
            path: part
            for path, part in task.frozen_parts().items()
            if path == AUTOENCODER or (options.text and path[0] == "text_encoders")
        },
        types_in(config),
        widen=False,
    )
    # In the compute type of a step, so that training equals that without a cache.
    params = cast(parts, config.train.compute)
    text = None if tokenizers is None else CaptionEncoder(task, params, tokenizers, options)
    space = LatentSpace(
        autoencoder=encoder_fingerprint(task, parts),
        text=None if tokenizers is None else text_fingerprint(task, parts, tokenizers),
        dtype=options.dtype,
        views=options.views,
        shapes=[list(shape) for shape in transforms.shapes],
        crop=transforms.crop,
        flip=transforms.flip,
    )
    encoder = LatentEncoder(task.model.autoencoder, params["autoencoder"], options)
    return Cache(encoder, text, space, options)


def write_empty(folder: epath.Path, cache: Cache) -> None:
    """Write the features of the empty caption, if text is cached."""
    if cache.text is not None and not (folder / EMPTY).exists():
        data = io.BytesIO()
        np.save(data, cache.text([""])[0], allow_pickle=False)
        write_whole(folder / EMPTY, data.getvalue())


def write_latents(
    folder: epath.Path,
    shard_ranges: Iterable[ShardRange],
    workers: Workers,
    cache: Cache,
    seen: Callable[[int], None],
) -> Iterator[Shard]:
    """Yield shards of latents; `seen` is called with the number of records read so far."""
    shard_ranges = list(shard_ranges)
    chunks = [
        (shard_range, range(start, min(start + _CHUNK, shard_range.stop)), cache.options.views)
        for shard_range in shard_ranges
        for start in range(shard_range.start, shard_range.stop, _CHUNK)
    ]
    # One map over all shards: workers keep reading while a shard is written.
    read = zip(chunks, workers.map(_crops, chunks), strict=True)
    count = 0
    for shard_range, parts in itertools.groupby(read, key=lambda part: part[0][0]):
        shard = _ShardEncoder(cache)
        for (_, indices, _), crops in parts:
            for found in crops:
                shard.add(found)
            count += len(indices)
            seen(count)
        records = shard.finish()
        yield write_shard(folder, shard_range, records, shard.rejects, shard.shapes)


def _crops(reader: RecordReader, chunk: tuple[ShardRange, range, int]) -> list[Crops | RecordError]:
    _, indices, views = chunk
    return [reader.views(index, views) for index in indices]


class _ShardEncoder:
    """Encodes the records of a shard in batches of one shape, and restores their order."""

    def __init__(self, cache: Cache):
        self._encoder, self._text = cache.encoder, cache.text
        self.rejects: list[Reject] = []
        self.shapes: list[list[int]] = []
        self._crops: list[Crops] = []
        # Of each record: of its image and each reference, the moments of all views.
        self._moments: list[list[list[np.ndarray]]] = []
        self._waiting: dict[int, list[tuple[list[np.ndarray], np.ndarray]]] = {}
        self._in_flight: deque[tuple[Sequence[list[np.ndarray]], jax.Array]] = deque()

    def add(self, crops: Crops | RecordError) -> None:
        """Add the next record of the source."""
        if isinstance(crops, RecordError):
            self.rejects.append(crops.reject)
            return
        moments: list[list[np.ndarray]] = [[] for _ in crops.shapes]
        for view in crops.views:
            images = (view.image, *view.references)
            for shape, found, image in zip(crops.shapes, moments, images, strict=True):
                waiting = self._waiting.setdefault(shape, [])
                waiting.append((found, image))
                if len(waiting) == self._encoder.batch_size:
                    self._send(shape)
        empty = [View(_NO_PIXELS, view.size_crop) for view in crops.views]
        self._crops.append(crops._replace(views=empty))
        self._moments.append(moments)
        self.shapes.append(crops.shapes)

    def finish(self) -> Iterator[bytes]:
        """Yield all records, encoded."""
        for shape in list(self._waiting):
            self._send(shape)
        while self._in_flight:
            self._take()
        for crops, found, text in zip(self._crops, self._moments, self._texts(), strict=True):
            moments, *references = (np.stack(views) for views in found)
            yield encode_latents(
                {
                    "moments": moments,
                    "text": text,
                    "size_crop": np.stack([view.size_crop for view in crops.views]),
                    "captions": crops.captions,
                    "name": crops.name,
                    "digest": crops.digest,
                    "references": references,
                }
            )

    def _texts(self) -> Iterator[np.ndarray | None]:
        """Yield the features of each record's captions."""
        if self._text is None:
            yield from [None] * len(self._crops)
            return
        size = self._encoder.batch_size
        for start in range(0, len(self._crops), size):
            captions = [crops.captions for crops in self._crops[start : start + size]]
            rows = self._text([caption for some in captions for caption in some])
            yield from np.split(rows, np.cumsum([len(some) for some in captions])[:-1])

    def _send(self, shape: int) -> None:
        waiting = self._waiting.pop(shape, [])
        if not waiting:
            return
        found, images = zip(*waiting, strict=True)
        self._in_flight.append((found, self._encoder(images)))
        if len(self._in_flight) > _IN_FLIGHT:
            self._take()

    def _take(self) -> None:
        found, moments = self._in_flight.popleft()
        for views, one in zip(found, np.asarray(moments), strict=False):  # the rest is padding
            views.append(one)


_NO_PIXELS = np.zeros((0, 0, 3), np.uint8)  # replaces pixels that are on the devices
