"""The compiled way from token ids, seeds and images to images."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.editing import coarse, mixed
from jaxdiff.models.clip import Clip, ClipConfig
from jaxdiff.models.layers import any_rngs, merge
from jaxdiff.models.tiling import Pieces
from jaxdiff.models.unet2d_condition import UNet2DConditionConfig
from jaxdiff.sampling.clip_guidance import ClipGuidance, Match, look, steered
from jaxdiff.sampling.guidance import ClassifierFree
from jaxdiff.sampling.sampler import Source, noise_from_seeds, sample
from jaxdiff.sampling.settings import SamplingConfig
from jaxdiff.sampling.solvers import Solver
from jaxdiff.training.diffusion import NEGATIVE_BEAUTY, DenoiserConfig, DiffusionTask, whole
from jaxdiff.training.task import from_uint8


def reads_mask(denoiser: DenoiserConfig) -> bool:
    """Whether a network is told of a mask and of what lies around it."""
    return isinstance(denoiser, UNet2DConditionConfig) and denoiser.in_channels > denoiser.channels


@functools.lru_cache(maxsize=16)
def compiled(
    task: DiffusionTask,
    graphdef: Any,
    settings: SamplingConfig,
    solver: Solver,
    shape: tuple[int, int, int],
    decode_by: Pieces,
    clip: ClipGuidance | None,
    clip_model: ClipConfig | None,
    repeats: int,
):
    """The jitted loop for one solver and one shape; the batch size and snapshots are static too."""
    size = shape[0] * task.downsampling, shape[1] * task.downsampling
    guidance = ClassifierFree(
        prediction=task.objective.prediction,
        schedule=task.objective.schedule,
        threshold=settings.threshold,
        interval=settings.interval,
        rescale=settings.rescale,
    )

    @functools.partial(jax.jit, static_argnums=4)
    def draw(weights, rows, num_steps, first, num_snapshots):
        model = nnx.merge(graphdef, weights["params"])
        frozen = weights["frozen"]
        framing = whole(*size, len(rows["ids"]))
        text = task.features(model, frozen, rows["ids"], framing)
        if "toward" in rows:
            toward = task.features(model, frozen, rows["toward"], framing)
            text = mixed(text, toward, rows["share"])
        denoise = guidance.denoiser(
            _told_of_mask(task, frozen, rows, task.network(model, frozen)),
            text,
            task.features(model, frozen, rows["negative_ids"], framing, NEGATIVE_BEAUTY),
            rows["scale"],
        )
        if clip is not None:
            match = _match(task, weights, rows, clip_model, clip.cutouts)
            denoise = steered(
                denoise,
                match,
                task.objective.schedule,
                rows["clip_scale"][0],
                interval=clip.interval,
            )
        noise = rows["noise"] if "noise" in rows else noise_from_seeds(rows["seeds"], shape)
        sampled = sample(
            denoise,
            solver,
            task.objective.schedule,
            settings.grid,
            num_steps,
            noise,
            rows["seeds"],
            unit_noise=settings.unit_noise,
            num_snapshots=num_snapshots,
            source=_source(task, frozen, rows),
            first=first,
            repeats=repeats,
        )
        x = sampled.snapshots if num_snapshots else sampled.images[None]
        images = task.decode(frozen, x.reshape(-1, *shape), decode_by)
        images = images.reshape(*x.shape[:2], *images.shape[1:])
        images = jnp.clip(images / 2 + 0.5, 0, 1)
        if "mask" in rows:  # latents keep an image about as it is, pixels exactly
            anew = rows["mask"][..., None]
            images = anew * images + (1 - anew) * rows["image"] / 255
        return images if num_snapshots else images[0]

    return draw


def _source(task: DiffusionTask, frozen: Any, rows: dict[str, Any]) -> Source | None:
    """The images to start from, in the space that is modelled."""
    if "image" not in rows:
        return None
    x0 = task.encode(frozen, from_uint8(rows["image"]))
    if "mask" not in rows:
        return Source(x0)
    # A network that reads the mask keeps what is to be kept by itself.
    keeps = reads_mask(task.denoiser)
    mask = None if keeps else coarse(rows["mask"], task.downsampling)
    return Source(x0, mask, from_noise=True)


def _told_of_mask(task: DiffusionTask, frozen: Any, rows: dict[str, Any], network: Any) -> Any:
    """A network for inpainting, told of the mask and of what lies around it; others as they are."""
    if not reads_mask(task.denoiser):
        return network
    around = from_uint8(rows["image"]) * (rows["mask"] < 0.5)[..., None]
    mask = coarse(rows["mask"], task.downsampling)
    told = jnp.concatenate([mask, task.encode(frozen, around)], axis=-1)
    told = jnp.concatenate([told, told])  # for the prompts and for the negative ones

    def call(x, t, text):
        return network(jnp.concatenate([x, told.astype(x.dtype)], axis=-1), t, text)

    return call


def _match(
    task: DiffusionTask,
    weights: Any,
    rows: dict[str, Any],
    config: ClipConfig | None,
    cutouts: int,
) -> Match:
    """How well CLIP finds that estimates of x0 match the prompts: its logits."""
    assert config is not None
    clip = merge(lambda: Clip(config, rngs=any_rngs()), weights["clip"])
    ids = rows["clip_ids"]

    def match(x0, t):
        images = jnp.clip(task.decode(weights["frozen"], x0), -1, 1)
        seen = look(images, config.vision.image_size, cutouts, t)
        embeddings = clip(seen, ids)
        image = embeddings.image.reshape(-1, *embeddings.text.shape)
        return embeddings.logit_scale * jnp.mean(jnp.sum(image * embeddings.text, -1), 0)

    return match
