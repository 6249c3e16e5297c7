"""Encoding a data set's images ahead of training, on all devices of this process."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, PyTree, UInt8

from jaxdiff.config import Config
from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.cached_latents import encode_latents
from jaxdiff.data.shard_writing import Crops, Reading, Stretch, Workers, write_shard
from jaxdiff.data.shards import LatentSpace, Shard
from jaxdiff.errors import UserError
from jaxdiff.models.layers import blueprint, merge
from jaxdiff.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from jaxdiff.parallel.sharding import replicated
from jaxdiff.training.cached_latents import encoder_fingerprint
from jaxdiff.training.diffusion import DiffusionTask, Latents
from jaxdiff.training.step import cast
from jaxdiff.training.task import from_uint8

_CHUNK = 16  # records that a worker reads at a time
_AHEAD = 2  # batches under way on the devices before one is taken from them


@dataclass(frozen=True, kw_only=True)
class LatentOptions:
    """Whether and how latents are cached in the place of images."""

    views: int = 0
    """Crops of each image to encode; every second one is mirrored, if the recipe mirrors. 0 leaves
    images as they are."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type that mean and logarithm of the variance are stored in."""
    batch_size: int = 32
    """Images that a device encodes at a time."""


class Encoder:
    """The half of an autoencoder that makes latents; each shape of images compiles once.

    Args:
      latents: of the recipe.
      params: the autoencoder's, on the host, in the type to compute in.
      options: how.
    """

    def __init__(self, latents: Latents, params: PyTree, options: LatentOptions):
        devices = jax.local_devices()
        mesh = make_mesh(MeshConfig(), devices)
        self.batch_size = options.batch_size * len(devices)
        self._sharding = batch_sharding(mesh)
        self._params = jax.device_put(params, replicated(mesh))

        def encode(params: PyTree, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b i j c"]:
            z = merge(blueprint(Latents.build, latents), params).encode(from_uint8(images))
            return jnp.concatenate([z.mean, z.logvar], axis=-1).astype(options.dtype)

        self._encode = jax.jit(encode)

    def __call__(self, images: Sequence[np.ndarray]) -> Float[Array, "b i j c"]:
        """Moments of up to `batch_size` images uint8 [h, w, 3], of a batch that is always full."""
        full = np.resize(np.stack(images), (self.batch_size, *images[0].shape))
        return self._encode(self._params, jax.device_put(full, self._sharding))


class Cache(NamedTuple):
    """An encoder, and what the manifest says of its latents."""

    encoder: Encoder
    space: LatentSpace
    options: LatentOptions


def make_cache(config: Config, autoencoder: Mapping[str, Any], options: LatentOptions) -> Cache:
    """For the latents that a recipe trains on, with the weights of its autoencoder.

    Raises:
      UserError: the recipe has no autoencoder, or the options are none.
    """
    task, transforms = config.task, config.data.transforms
    if options.views < 1 or options.batch_size < 1:
        raise UserError(
            f"latents.views is {options.views} and latents.batch_size {options.batch_size}: "
            "expected positive numbers."
        )
    latents = check_latents(task)
    space = LatentSpace(
        autoencoder=encoder_fingerprint(autoencoder),
        dtype=options.dtype,
        views=options.views,
        shapes=[list(shape) for shape in transforms.shapes],
        crop=transforms.crop,
        flip=transforms.flip,
    )
    # As a step would have them, so that training is the same as if it encoded images itself.
    params = cast(autoencoder, config.train.compute)
    return Cache(Encoder(latents, params, options), space, options)


def check_latents(task: Any) -> Latents:
    """The latent space of a task; raises `UserError` where it has none."""
    if isinstance(task, DiffusionTask) and task.latents is not None:
        return task.latents
    raise UserError(
        "This recipe has no autoencoder to cache latents of: expected a diffusion task with "
        "task.latents, such as that of configs/produce.py; leave --latents.views out."
    )


def write_latents(
    folder: epath.Path,
    stretches: Iterable[Stretch],
    workers: Workers,
    cache: Cache,
    seen: Callable[[int], None],
) -> Iterator[Shard]:
    """Shards of latents, one after the other; `seen` is told how many records were read so far."""
    stretches = list(stretches)
    chunks = [
        (stretch, range(start, min(start + _CHUNK, stretch.stop)), cache.options.views)
        for stretch in stretches
        for start in range(stretch.start, stretch.stop, _CHUNK)
    ]
    # Of all shards in one go, so that those who read need not wait while a shard is written.
    read = zip(chunks, workers.map(_crops, chunks), strict=True)
    count = 0
    for stretch, parts in itertools.groupby(read, key=lambda part: part[0][0]):
        shard = _Shard(cache)
        for (_, indices, _), crops in parts:
            for found in crops:
                shard.add(found)
            count += len(indices)
            seen(count)
        records = shard.finish()
        yield write_shard(folder, stretch, records, shard.rejects, shard.shapes)


def _crops(reading: Reading, chunk: tuple[Stretch, range, int]) -> list[Crops | RecordError]:
    _, indices, views = chunk
    return [reading.views(index, views) for index in indices]


class _Shard:
    """The records of a shard in their order, their latents filled in as batches come back."""

    def __init__(self, cache: Cache):
        self._encoder, self._single = cache.encoder, len(cache.space.shapes) == 1
        self.rejects: list[str] = []
        self.shapes: list[int] = []
        self._crops: list[Crops] = []
        self._moments: list[list[np.ndarray]] = []
        self._waiting: dict[int, list[tuple[int, np.ndarray]]] = {}
        self._under_way: deque[tuple[list[int], jax.Array]] = deque()

    def add(self, crops: Crops | RecordError) -> None:
        """The next record of the source."""
        if isinstance(crops, RecordError):
            self.rejects.append(str(crops))
            return
        place = len(self._crops)
        for view in crops.views:
            waiting = self._waiting.setdefault(crops.shape, [])
            waiting.append((place, view.image))
            if len(waiting) == self._encoder.batch_size:
                self._send(crops.shape)
        self._crops.append(crops._replace(views=[v._replace(image=_NONE) for v in crops.views]))
        self._moments.append([])
        if not self._single:
            self.shapes.append(crops.shape)

    def finish(self) -> Iterator[bytes]:
        """All records, encoded."""
        for shape in list(self._waiting):
            self._send(shape)
        while self._under_way:
            self._take()
        for crops, moments in zip(self._crops, self._moments, strict=True):
            yield encode_latents(
                {
                    "moments": np.stack(moments),
                    "framing": np.stack([view.framing for view in crops.views]),
                    "captions": crops.captions,
                    "name": crops.name,
                }
            )

    def _send(self, shape: int) -> None:
        waiting = self._waiting.pop(shape, [])
        if not waiting:
            return
        places, images = zip(*waiting, strict=True)
        self._under_way.append((list(places), self._encoder(images)))
        if len(self._under_way) > _AHEAD:
            self._take()

    def _take(self) -> None:
        places, moments = self._under_way.popleft()
        for place, one in zip(places, np.asarray(moments), strict=False):  # the rest filled it up
            self._moments[place].append(one)


_NONE = np.zeros((0, 0, 3), np.uint8)  # in the place of pixels that have gone to the devices
