"""Auxiliary models: a CLIP that scores or guides images, and the guide model of autoguidance."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int, PyTree, UInt8

from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.distributed.replicas import local_mesh, replicate, shard
from jaxdiff.errors import UserError
from jaxdiff.models.layers import ComputeType, bind_init, bind_params, cast
from jaxdiff.models.text_encoders.clip import ClipConfig, ClipText, ClipVision, unit_vectors
from jaxdiff.models.text_to_image import TextToImage, from_uint8
from jaxdiff.pipelines.batching import in_full_batches
from jaxdiff.pipelines.latent_spaces import have_same_latents
from jaxdiff.pipelines.prompt_weights import plain
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.sampling.guidance.clip_guidance import clip_views

_BATCH_SIZE = 16  # images that a CLIP scores at a time


class LoadedClip(NamedTuple):
    """A CLIP, its parameters on each device, and its tokenizer."""

    config: ClipConfig
    params: PyTree
    tokenizer: TextTokenizer


@functools.lru_cache(maxsize=2)
def load_clip(model: str, mesh: Mesh) -> LoadedClip:
    """Load a CLIP in float32.

    Raises:
      UserError: there is no such model, or it is no CLIP.
    """
    bundle = load_bundle(model)
    if not isinstance(bundle.spec, ClipConfig) or "text" not in bundle.tokenizers:
        raise UserError(
            f"{model} is of type {type(bundle.spec).__name__}: expected a CLIP; give the folder or "
            "the hub's id of one, such as openai/clip-vit-large-patch14, a run of "
            "configs/produce_clip.py, or shipped:produce_clip."
        )
    params = replicate(cast(bundle.params, "float32"), mesh)
    return LoadedClip(bundle.spec, params, bundle.tokenizers["text"])


def clip_scores(
    model: str, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str]
) -> Float32[np.ndarray, " n"]:
    """Return the cosine similarity, from -1 to 1, of each image and its prompt.

    Raises:
      UserError: as `load_clip`.
    """
    clip = load_clip(model, local_mesh())
    embed = functools.partial(_compiled_images(clip.config), clip.params["vision"])
    vectors = in_full_batches(embed, _BATCH_SIZE, images)
    return np.sum(vectors * clip_text_vectors(model, prompts), axis=1)


def clip_text_vectors(model: str, prompts: Sequence[str]) -> Float32[np.ndarray, "n e"]:
    """Return the unit vectors of prompts.

    Raises:
      UserError: as `load_clip`.
    """
    clip = load_clip(model, local_mesh())
    ids = clip.tokenizer([plain(prompt) for prompt in prompts])
    embed = functools.partial(_compiled_texts(clip.config), clip.params["text"])
    return in_full_batches(embed, _BATCH_SIZE, ids)


def clip_image_vectors(
    config: ClipConfig, params: PyTree, images: UInt8[Array, "b h w 3"]
) -> Float32[Array, "b e"]:
    """Return the unit vectors of images, given the parameters of the image encoder."""
    vision = bind_params(bind_init(ClipVision, config.vision), params)
    views = clip_views(from_uint8(images), config.vision.image_size, 0, jnp.zeros(()))
    # TPUs and GPUs would round, so that scores would depend on the device.
    with jax.default_matmul_precision("highest"):
        return unit_vectors(vision(views).pooled)


@functools.lru_cache(maxsize=2)
def _compiled_images(config: ClipConfig):
    return jax.jit(functools.partial(clip_image_vectors, config))


@functools.lru_cache(maxsize=2)
def _compiled_texts(config: ClipConfig):
    @jax.jit
    def embed(params: PyTree, ids: Int[Array, "b n"]):
        text = bind_params(bind_init(ClipText, config.text), params)
        with jax.default_matmul_precision("highest"):
            return unit_vectors(text(ids).pooled)

    return embed


class LoadedGuide(NamedTuple):
    """The model of autoguidance, and its parameters on the devices."""

    spec: TextToImage
    params: PyTree


def load_guide(
    model: str,
    own: Bundle,
    dtype: ComputeType | None,
    mesh: Mesh,
    types: Sequence[type] = (),
) -> LoadedGuide:
    """Load the guide model of autoguidance.

    Args:
      model: to load.
      own: the model that it guides.
      dtype: to compute in; None is that of the weights.
      mesh: of the devices.
      types: dataclasses that its specification may name.

    Raises:
      UserError: there is no such model, or it is of another kind than `own`.
    """
    bundle, spec = load_bundle(model, types=types), own.spec
    assert isinstance(spec, TextToImage)
    if not isinstance(bundle.spec, TextToImage):
        raise UserError(
            f"{model} is of type {type(bundle.spec).__name__}: expected a text-to-image model in "
            "guide.model (--guide-model)."
        )
    theirs = bundle.spec
    differs = {
        "another tokenizer": _tokenizers(bundle) != _tokenizers(own),
        "another schedule": theirs.schedule != spec.schedule,
        "other latents": not have_same_latents(bundle, own),
        "a network of other inputs": _channels(theirs) != _channels(spec),
    }
    for what, is_other in differs.items():
        if is_other:
            raise UserError(
                f"{model} has {what} than {spec.name}: expected a model of the same kind in "
                "guide.model (--guide-model), such as an earlier or shorter run of its recipe."
            )
    params = bundle.params if dtype is None else cast(bundle.params, dtype)
    return LoadedGuide(theirs, shard(params, mesh, theirs.param_axes()))


def _tokenizers(bundle: Bundle) -> dict[str, str]:
    return {name: tokenizer.fingerprint for name, tokenizer in bundle.tokenizers.items()}


def _channels(spec: TextToImage) -> tuple[int, int]:
    return spec.denoiser.channels, spec.denoiser.extra_channels
