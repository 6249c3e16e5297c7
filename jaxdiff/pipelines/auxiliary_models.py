"""Models beside the one that draws: a CLIP that looks, a weaker one to steer away from."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int, PyTree, UInt8

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.distributed.replicate import drawing_mesh, on_all
from jaxdiff.errors import UserError
from jaxdiff.models.layers import bind_init, merge
from jaxdiff.models.text_encoders.clip import Clip, ClipConfig
from jaxdiff.pipelines.batching import in_full_batches
from jaxdiff.pipelines.prompt_weights import plain
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.load import read_bundle
from jaxdiff.sampling.guidance.clip_guidance import look
from jaxdiff.training.step import ComputeType, cast, structure
from jaxdiff.training.tasks.base import from_uint8
from jaxdiff.training.tasks.clip import ClipTask
from jaxdiff.training.tasks.diffusion import DiffusionTask

_AT_A_TIME = 16  # images that a CLIP looks at


@functools.lru_cache(maxsize=2)
def read_clip(model: str, mesh: Mesh) -> tuple[ClipConfig, Any, Tokenizer]:
    """Sizes, weights on all devices, and tokenizer of a CLIP.

    Raises:
      UserError: there is no such model, or it is none.
    """
    bundle = read_bundle(model)
    task = bundle.config.task
    if not isinstance(task, ClipTask) or bundle.tokenizer is None:
        raise UserError(
            f"{model} is no CLIP but a {type(task).__name__}: give the folder or the hub's id of "
            "one, such as openai/clip-vit-large-patch14, a run of configs/produce_clip.py or the "
            "like, or shipped:produce_clip."
        )
    return task.model, on_all(cast(bundle.params, "float32"), mesh), bundle.tokenizer


def clip_scores(
    model: str, images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str]
) -> Float32[np.ndarray, " n"]:
    """How well a CLIP finds that images match their prompts: cosines, from -1 to 1.

    Raises:
      UserError: as `read_clip`.
    """
    config, params, tokenizer = read_clip(model, drawing_mesh())
    ids = tokenizer([plain(prompt) for prompt in prompts])
    score = functools.partial(_scorer(config), params)
    return in_full_batches(score, _AT_A_TIME, images, ids)


@functools.lru_cache(maxsize=2)
def _scorer(config: ClipConfig):
    @jax.jit
    def score(params, images, ids):
        clip = merge(bind_init(Clip, config), params)
        seen = look(from_uint8(images), config.vision.image_size, 0, jnp.zeros(()))
        embeddings = clip(seen, ids)
        return jnp.sum(embeddings.image * embeddings.text, axis=-1)

    return score


class Chosen(NamedTuple):
    """Which of several images a CLIP chose for each prompt."""

    rows: Int[np.ndarray, " n"]  # their places among all images
    scores: Float32[np.ndarray, "n k"]  # of all, cosines


def choose(
    model: str, images: UInt8[np.ndarray, "m h w 3"], prompts: Sequence[str], of: int
) -> Chosen:
    """Of every `of` images in a row, with their prompts, the one that a CLIP finds closest.

    Raises:
      UserError: as `read_clip`.
    """
    scores = clip_scores(model, images, prompts).reshape(-1, of)
    return Chosen(np.arange(0, len(images), of) + scores.argmax(1), scores)


class WeakModel(NamedTuple):
    """What of a weaker model the compiled loop takes: what it is, and its weights."""

    task: DiffusionTask
    graphdef: Any
    weights: PyTree

    @property
    def kind(self) -> tuple[DiffusionTask, Any]:
        """What programs are compiled for."""
        return self.task, self.graphdef


def read_weak(model: str, strong: Bundle, dtype: ComputeType | None, mesh: Mesh) -> WeakModel:
    """A model to be steered away from, in the type that the strong one computes in.

    Raises:
      UserError: there is no such model, or it does not fit the strong one.
    """
    bundle = read_bundle(model)
    task, own = bundle.config.task, strong.config.task
    assert isinstance(own, DiffusionTask)
    if not isinstance(task, DiffusionTask) or bundle.tokenizer is None:
        raise UserError(f"{model} is no text-to-image model: give a weaker one in weak.model.")
    theirs, ours = bundle.tokenizer.bpe.to_str(), strong.tokenizer and strong.tokenizer.bpe.to_str()
    differ = {
        "another tokenizer": theirs != ours,
        "another schedule": task.objective.schedule != own.objective.schedule,
        "other latents": not _same_latents(bundle, strong),
        "a network of other inputs": _inputs(task) != _inputs(own),
    }
    if any(differ.values()):
        what = next(name for name, is_so in differ.items() if is_so)
        raise UserError(
            f"{model} has {what} than {strong.config.name}: give a weaker model of the same kind, "
            "such as an earlier or shorter run of the same recipe, in weak.model."
        )
    weights = {"params": bundle.params, "frozen": bundle.frozen}
    weights = on_all(weights if dtype is None else cast(weights, dtype), mesh)
    return WeakModel(task, structure(task), weights)


def _inputs(task: DiffusionTask) -> tuple[int, ...]:
    return task.denoiser.channels, getattr(task.denoiser, "in_channels", task.denoiser.channels)


def _same_latents(one: Bundle, other: Bundle) -> bool:
    """Whether two models work on the same space; weights may differ by the rounding of a half."""
    a, b = one.config.task, other.config.task
    assert isinstance(a, DiffusionTask)
    assert isinstance(b, DiffusionTask)
    if a.latents is None or b.latents is None:
        return a.latents is b.latents
    if a.latents.model != b.latents.model:
        return False
    pairs = zip(
        jax.tree.leaves(one.frozen["autoencoder"]),
        jax.tree.leaves(other.frozen["autoencoder"]),
        strict=True,
    )
    return all(
        np.allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=0.01, atol=1e-4)
        for x, y in pairs
    )
