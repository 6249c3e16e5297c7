"""The images of a data set as vectors: in CLIP's joint space, and in an autoencoder's latents."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.sources.cached_latents import CachedLatents
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.distributed.replicas import local_mesh
from jaxdiff.errors import UserError
from jaxdiff.explore.axes import ATTRIBUTES
from jaxdiff.io.terminal import console, write_line
from jaxdiff.models.autoencoders.base import AutoencoderSpec
from jaxdiff.models.layers import bind_build, bind_init, bind_params
from jaxdiff.models.text_encoders.clip import Clip, ClipConfig, unit_vectors
from jaxdiff.models.text_to_image import TextToImage, from_uint8
from jaxdiff.pipelines.auxiliary_models import load_clip
from jaxdiff.pipelines.batching import in_full_batches
from jaxdiff.pretrained.bundle import AnySpec
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.training.metrics import Progress
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.diffusion import DiffusionTask

PIXELS_AT_A_TIME = 2**18  # 64 images of 64 x 64


class Records(NamedTuple):
    """Records of a data set after its transforms."""

    images: UInt8[np.ndarray, "n h w 3"]
    captions: list[str]
    names: list[str]
    truths: dict[str, Float[np.ndarray, " n"]]  # attributes of synthetic scenes, else {}


class ClipReader(NamedTuple):
    """A CLIP's tokenizer, and functions that embed images and texts as unit vectors."""

    tokenizer: TextTokenizer
    images: Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, "n d"]]
    texts: Callable[[Sequence[str]], Float[np.ndarray, "n d"]]


def read_records(config: Config, samples: int, seed: int) -> Records:
    """Sample records of a recipe's data at random; bad ones are reported and left out.

    Raises:
      UserError: the data are missing or latents, or fewer than 10 of the records can be used.
    """
    source = config.data.source
    if isinstance(source, CachedLatents):
        raise UserError(
            f"{source.path} holds latents: expected images; give the recipe of the original data."
        )
    source.check()
    transforms = dataclasses.replace(
        config.data.transforms, buckets=None, crop="center", flip=False, caption_dropout=0.0
    )
    rng = np.random.default_rng(seed)
    count = min(samples, len(source))
    chosen = np.sort(rng.choice(len(source), count, replace=False)).tolist()
    images, captions, names, kept = [], [], [], []
    with Progress(count, unit="record", console=console(stderr=True)) as progress:
        for done, index in enumerate(chosen, 1):
            try:
                record = source[index]
                image, caption, *_ = transforms(record, np.random.default_rng((seed, index)))
            except RecordError as error:
                write_line(f"Skipped {error}", stderr=True)
            else:
                images.append(image)
                captions.append(caption)
                names.append(record["name"])
                kept.append(index)
            progress.update(done)
    if len(kept) < 10:
        raise UserError(
            f"Only {len(kept)} of {count} records are usable: expected at least 10; repair them, "
            "or use other data."
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
    """Load the CLIP of a run, of an exported model, or `shipped:produce_clip`.

    Raises:
      UserError: there is no such model, or it is no CLIP.
    """
    config, params, tokenizer = load_clip(model, local_mesh(jax.local_devices()[:1]))
    build, size = bind_init(Clip, config), config.vision.image_size

    @jax.jit
    def image_vectors(params, images):
        views = _resized(from_uint8(images), size)
        return unit_vectors(bind_params(build, params).vision(views).pooled)

    @jax.jit
    def text_vectors(params, ids):
        return unit_vectors(bind_params(build, params).text(ids).pooled)

    def texts(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(text_vectors(params, tokenizer(list(texts))))

    embed = functools.partial(image_vectors, params)
    return ClipReader(tokenizer, lambda images: _in_batches(embed, images, size), texts)


def is_clip(config: Config) -> bool:
    """Whether a recipe trains a CLIP."""
    return isinstance(config.task.model, ClipConfig)


def has_autoencoder(config: Config) -> bool:
    """Whether a recipe trains an autoencoder, or a model on the latents of one."""
    return _autoencoder_of(config.task.model) is not None


def _autoencoder_of(spec: AnySpec) -> AutoencoderSpec | None:
    """Return the autoencoder of a text-to-image model, or the model if it is an autoencoder."""
    if isinstance(spec, TextToImage):
        return spec.autoencoder
    return spec if isinstance(spec, AutoencoderSpec) else None


def read_autoencoder(config: Config, model: str | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from images uint8 [n, h, w, 3] to flat latents float32 [n, d].

    Args:
      config: of a recipe; its pretrained autoencoder, if any, is the default of `model`.
      model: a run, an exported model or `shipped:NAME` that is an autoencoder or has one; by
        default `shipped:produce`.

    Raises:
      UserError: there is no such model, or it has no autoencoder.
    """
    task = config.task
    if model is None and isinstance(task, DiffusionTask) and task.pretrained.autoencoder:
        model = task.pretrained.autoencoder
    bundle = load_bundle(model or "shipped:produce")
    autoencoder = _autoencoder_of(bundle.spec)
    if autoencoder is None:
        raise UserError(
            f"{model} is a {type(bundle.spec).__name__} without autoencoder: expected a model with "
            "one; give its folder, or shipped:produce, as --autoencoder."
        )
    params = bundle.params
    if isinstance(bundle.spec, TextToImage):
        params = params["autoencoder"]
    build, size = bind_build(autoencoder), config.data.transforms.size

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


def _in_batches(embed: Callable[..., jax.Array], images: np.ndarray, side: int) -> np.ndarray:
    """Apply a function to all images, in batches of about `PIXELS_AT_A_TIME`."""
    size = max(1, min(PIXELS_AT_A_TIME // side**2, len(images)))
    with Progress(len(images), unit="image", console=console(stderr=True)) as progress:
        return in_full_batches(embed, size, images, seen=progress.update)
