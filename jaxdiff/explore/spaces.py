"""The images of a data set as vectors: in CLIP's joint space, and in an autoencoder's latents."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from rich.console import Console

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.sources.cached_latents import CachedLatents
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.distributed.replicate import local_mesh
from jaxdiff.errors import UserError
from jaxdiff.explore.axes import ATTRIBUTES
from jaxdiff.models.autoencoders.base import AutoencoderSpec
from jaxdiff.models.layers import bind_init, bind_params
from jaxdiff.models.text_encoders.clip import Clip, ClipConfig
from jaxdiff.models.text_to_image import TextToImage, from_uint8
from jaxdiff.pipelines.auxiliary_models import load_clip
from jaxdiff.pipelines.batching import in_full_batches
from jaxdiff.pretrained.bundle import AnySpec
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.training.metrics import Progress
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.diffusion import DiffusionTask

PIXELS_AT_A_TIME = 2**18  # 64 images of 64 x 64: many enough for a device, few enough for any


class Records(NamedTuple):
    """Some records of a data set, as a model sees them."""

    images: UInt8[np.ndarray, "n h w 3"]
    captions: list[str]
    names: list[str]
    truths: dict[str, Float[np.ndarray, " n"]]  # {} where nobody knows what was drawn


class ClipReader(NamedTuple):
    """A CLIP, and how it reads."""

    tokenizer: TextTokenizer
    images: Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, "n d"]]
    texts: Callable[[Sequence[str]], Float[np.ndarray, "n d"]]


def read_records(config: Config, samples: int, seed: int) -> Records:
    """So many records of a recipe's data, drawn at random; bad ones are named and left out.

    Raises:
      UserError: the data are missing or latents, or fewer than 10 of the records can be used.
    """
    source = config.data.source
    if isinstance(source, CachedLatents):
        raise UserError(
            f"{source.path} holds latents and no images: give the recipe that they were made of."
        )
    source.check()
    transforms = dataclasses.replace(
        config.data.transforms, buckets=None, crop="center", flip=False, caption_dropout=0.0
    )
    rng = np.random.default_rng(seed)
    count = min(samples, len(source))
    chosen = np.sort(rng.choice(len(source), count, replace=False)).tolist()
    images, captions, names, kept = [], [], [], []
    with Progress(count, unit="record", console=Console(stderr=True)) as progress:
        for done, index in enumerate(chosen, 1):
            try:
                record = source[index]
                image, caption, _ = transforms(record, np.random.default_rng((seed, index)))
            except RecordError as error:
                print(f"Skipped {error}", file=sys.stderr)
            else:
                images.append(image)
                captions.append(caption)
                names.append(record["name"])
                kept.append(index)
            progress.update(done)
    if len(kept) < 10:
        raise UserError(
            f"A map of {len(kept)} images says nothing: expected at least 10 records that can be "
            f"used, of the {count} that were read; repair them, or name other data."
        )
    truths = {}
    if isinstance(source, Produce):
        scenes = [source.scene(index) for index in kept]
        truths = {
            name: np.array([attribute.of(scene) for scene in scenes])
            for name, attribute in ATTRIBUTES.items()
        }
    return Records(np.stack(images), captions, names, truths)


def read_clip(model: str) -> ClipReader:
    """The CLIP of a run, of an exported model, or `shipped:produce_clip`.

    Raises:
      UserError: there is no such model, or it is no CLIP.
    """
    config, params, tokenizer = load_clip(model, local_mesh(jax.local_devices()[:1]))
    build, size = bind_init(Clip, config), config.vision.image_size

    @jax.jit
    def image_vectors(params, images):
        return _unit(bind_params(build, params).vision(_resized(from_uint8(images), size)).pooled)

    @jax.jit
    def text_vectors(params, ids):
        return _unit(bind_params(build, params).text(ids).pooled)

    def texts(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(text_vectors(params, tokenizer(list(texts))))

    see = functools.partial(image_vectors, params)
    return ClipReader(tokenizer, lambda images: _in_batches(see, images, size), texts)


def is_clip(config: Config) -> bool:
    """Whether a recipe trains a CLIP."""
    return isinstance(config.task.model, ClipConfig)


def has_autoencoder(config: Config) -> bool:
    """Whether a recipe trains an autoencoder, or a model on the latents of one."""
    return _autoencoder_of(config.task.model) is not None


def _autoencoder_of(spec: AnySpec) -> AutoencoderSpec | None:
    """Return the autoencoder of a model, or that is the model."""
    return (
        spec.autoencoder
        if isinstance(spec, TextToImage)
        else (spec if isinstance(spec, AutoencoderSpec) else None)
    )


def read_autoencoder(config: Config, model: str | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from images uint8 [n, h, w, 3] to flat latents float32 [n, d].

    Args:
      config: of a recipe, whose pretrained autoencoder is used, if it has one, where no model is
        named.
      model: a run, an exported model or `shipped:NAME` that is an autoencoder or has one; where
        neither is given it is `shipped:produce_autoencoder`.

    Raises:
      UserError: there is no such model, or no autoencoder in it.
    """
    task = config.task
    if model is None and isinstance(task, DiffusionTask) and task.pretrained.autoencoder:
        model = task.pretrained.autoencoder
    bundle = load_bundle(model or "shipped:produce_autoencoder")
    autoencoder = _autoencoder_of(bundle.spec)
    if autoencoder is None:
        raise UserError(
            f"There is no autoencoder in {model}, a {type(bundle.spec).__name__}: give "
            "--autoencoder the folder of a run that is one or has one, or "
            "shipped:produce_autoencoder."
        )
    params = bundle.params
    if isinstance(bundle.spec, TextToImage):
        params = params["autoencoder"]
    build = bind_init(type(autoencoder).build, autoencoder)
    size = config.data.transforms.size

    @jax.jit
    def latents(params, images):
        z = bind_params(build, params).encode(_resized(from_uint8(images), size)).mode()
        return z.reshape(len(z), -1).astype(jnp.float32)

    encode = functools.partial(latents, jax.device_put(params))
    return lambda images: _in_batches(encode, images, size)


def _resized(images: Float[Array, "b h w 3"], size: int) -> Float[Array, "b s s 3"]:
    b, height, width, c = images.shape
    if height == width == size:
        return images
    return jax.image.resize(images, (b, size, size, c), "cubic")  # antialiased if it shrinks


def _unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _in_batches(see: Callable[..., jax.Array], images: np.ndarray, side: int) -> np.ndarray:
    """What a function makes of all images, so many at a time that a device has enough to do."""
    size = max(1, min(PIXELS_AT_A_TIME // side**2, len(images)))
    with Progress(len(images), unit="image", console=Console(stderr=True)) as progress:
        return in_full_batches(see, size, images, seen=progress.update)
