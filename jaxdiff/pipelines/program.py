"""The compiled way from token ids, seeds and images to images."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxdiff.distributed.replicate import on_each
from jaxdiff.models.autoencoders.tiling import VaeMode
from jaxdiff.models.components import DenoiserConfig
from jaxdiff.models.convolutions import Wrap, wrap_convolutions
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import bind_init, merge
from jaxdiff.models.text_encoders.clip import Clip, ClipConfig
from jaxdiff.pipelines.editing import coarse, mixed
from jaxdiff.sampling.ddim_inversion import DDIMInverse, reversed_grid
from jaxdiff.sampling.guidance.cfg import ClassifierFree, Further, Guidance, Told, Weak
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance, Match, look, steered
from jaxdiff.sampling.loop import Part, Source, noise_from_seeds, sample
from jaxdiff.sampling.multidiffusion import Windows, windowed
from jaxdiff.sampling.sampler import SamplingConfig
from jaxdiff.sampling.solvers_ode import Solver
from jaxdiff.sampling.stateful_denoiser import AnyDenoise, Remembering
from jaxdiff.training.tasks.base import from_uint8
from jaxdiff.training.tasks.diffusion import BEAUTY, NEGATIVE_BEAUTY, DiffusionTask, whole


def reads_mask(denoiser: DenoiserConfig) -> bool:
    """Whether a network is told of a mask and of what lies around it."""
    return isinstance(denoiser, UNet2DConditionConfig) and denoiser.in_channels > denoiser.channels


class Steps(NamedTuple):
    """Which steps of how many are taken, counted from 0; those from `first` on are the whole run.

    A device that takes none, `begin == end`, has nothing to draw.
    """

    num_steps: Int[Array | np.ndarray, "*devices"]
    first: Int[Array | np.ndarray, "*devices"]
    begin: Int[Array | np.ndarray, "*devices"]
    end: Int[Array | np.ndarray, "*devices"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """All that a program is compiled for, beside the number of images at a time.

    Attributes:
      task: of the model.
      graphdef: of its network.
      settings: of its recipe.
      solver: that takes the steps.
      guidance: how the guidance scale acts.
      shape: of what is modelled, [h, w, c].
      mesh: the devices, each of which draws for itself.
      decode_by: what the autoencoder decodes at a time; None for what the loop ends at: latents, or
        the noise that was looked for.
      clip: how a CLIP steers.
      clip_model: which one.
      weak: the weaker model, what it is of `task` and `graphdef`.
      repeats: how often each step is taken.
      windows: through which the network sees the image.
      num_snapshots: estimates on the way, in the place of the image.
    """

    task: DiffusionTask
    graphdef: Any
    settings: SamplingConfig
    solver: Solver
    guidance: Guidance
    shape: tuple[int, int, int]
    mesh: Mesh
    decode_by: VaeMode | None = "whole"
    clip: ClipGuidance | None = None
    clip_model: ClipConfig | None = None
    weak: tuple[DiffusionTask, Any] | None = None
    repeats: int = 1
    windows: Windows | None = None
    num_snapshots: int = 0

    def __post_init__(self):
        # Other ones compile nothing: they are looked up, or among the rows.
        if self.clip is not None:
            object.__setattr__(self, "clip", dataclasses.replace(self.clip, model="", scale=0.0))


@functools.lru_cache(maxsize=16)
def compiled(drawing: Drawing):
    """The jitted loop on each device; the batch size is static too.

    It takes weights, rows, the `Steps` of each device, and the state in which it was left before
    the first of them. It gives what was drawn, [n, 1, ...] or as snapshots [n, k, ...], all zero
    before the last step, and the state; the last estimate of x0 is its last element's last.
    """
    task, num_snapshots = drawing.task, drawing.num_snapshots

    def draw(weights, rows, steps, state):
        sampled = sample(
            _denoiser(drawing, weights, rows, steps.num_steps),
            drawing.solver,
            task.objective.schedule,
            num_steps=steps.num_steps,
            seeds=rows["seeds"],
            num_snapshots=max(num_snapshots, 1),
            first=steps.first,
            repeats=drawing.repeats,
            part=None if state is None else Part(steps.begin, steps.end, state),
            **_course(drawing, weights["frozen"], rows),
        )
        x = sampled.snapshots if num_snapshots else sampled.images[None]

        def finish():
            if drawing.decode_by is None:
                return _undecoded(drawing, steps.num_steps, x).swapaxes(0, 1)
            return _images(drawing, drawing.decode_by, weights["frozen"], rows, x).swapaxes(0, 1)

        def nothing():
            made = jax.eval_shape(finish)
            return jnp.zeros(made.shape, made.dtype)

        finished = (steps.begin < steps.end) & (steps.end == steps.num_steps)
        return jax.lax.cond(finished, finish, nothing), sampled.state

    def draw_one(weights, rows, steps, state):
        images, state = draw(weights, rows, *jax.tree.map(lambda x: x[0], (steps, state)))
        return images, jax.tree.map(lambda x: x[None], state)

    return on_each(draw_one, drawing.mesh)


def _denoiser(
    drawing: Drawing, weights: Mapping[str, Any], rows: dict[str, Any], num_steps: Int[Array, ""]
) -> AnyDenoise:
    """The network, told of the prompts and guided, as solvers see it."""
    task, windows, settings = drawing.task, drawing.windows, drawing.settings
    # A network is told of an image of the size of what it sees.
    seen = (windows.height, windows.width) if windows else drawing.shape[:2]
    size = seen[0] * task.downsampling, seen[1] * task.downsampling
    wrap = (False, False) if windows else settings.seamless
    weak = None
    if drawing.weak is not None:
        told = _told(*drawing.weak, weights["weak"], rows, size, wrap)
        weak = Weak(told, rows["weak_scale"][0])
    guidance = ClassifierFree(guidance=drawing.guidance, threshold=settings.threshold)
    denoise = guidance.denoiser(
        _told(task, drawing.graphdef, weights, rows, size, wrap),
        rows["scale"],
        weak=weak,
        still_above=_end_of_rest(drawing.guidance, settings, num_steps),
    )
    if windows is not None:
        assert not isinstance(denoise, Remembering)  # of no window in particular
        denoise = windowed(denoise, windows, *drawing.shape[:2])
    if drawing.clip is None:
        return denoise
    return steered(
        denoise,
        _match(task, weights, rows, drawing.clip_model, drawing.clip.cutouts),
        task.objective.schedule,
        rows["clip_scale"][0],
        interval=drawing.clip.interval,
    )


def _told(
    task: DiffusionTask,
    graphdef: Any,
    weights: Mapping[str, Any],
    rows: dict[str, Any],
    size: tuple[int, int],
    wrap: Wrap,
) -> Told:
    """A model's network and what it is told of the prompts."""
    model, frozen = nnx.merge(graphdef, weights["params"]), weights["frozen"]

    def read(name: str = "", beauty: float = BEAUTY) -> Any:
        return _features(task, model, frozen, rows, name, size, beauty)

    cond, further = read(), None
    if "toward_ids" in rows:
        cond = mixed(cond, read("toward_"), rows["share"])
    if "more_ids" in rows:
        # One text after another, [k b n], as `read` does not know of the axis.
        flat = {
            name: jnp.swapaxes(rows[f"more_{name}"], 0, 1).reshape(-1, rows["ids"].shape[1])
            for name in ("ids", "weights")
            if f"more_{name}" in rows
        }
        flat |= {"empty": rows["empty"]} if "empty" in rows else {}
        texts = _features(task, model, frozen, flat, "", size, BEAUTY)
        count = rows["parts"].shape[1] - 1
        texts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), texts)
        further = Further(texts, rows["parts"])
    network = task.network(model, frozen)
    wrap_convolutions(network, wrap)
    return Told(
        network=_told_of_mask(task, frozen, rows, network),
        prediction=task.objective.prediction,
        schedule=task.objective.schedule,
        cond=cond,
        uncond=read("negative_", NEGATIVE_BEAUTY),
        further=further,
    )


def _features(
    task: DiffusionTask,
    model: Any,
    frozen: Any,
    rows: Mapping[str, Any],
    name: str,
    size: tuple[int, int],
    beauty: float,
) -> Any:
    """What a denoiser is told of the prompts in the rows of this name, their words weighted.

    Tokens go away from those of the empty prompt, or toward them. So does ComfyUI, and compel above
    1; a factor alone would also weight what all prompts have in common, of which there is much. The
    vector for a whole prompt stays: no word is in it by itself.
    """
    ids = rows[f"{name}ids"]
    text = task.features(model, frozen, ids, whole(*size, len(ids)), beauty)
    if f"{name}weights" not in rows:
        return text
    task = dataclasses.replace(task, zero_empty_prompt=False)
    empty = task.features(model, frozen, rows[f"{name}empty"][:1], whole(*size, 1)).tokens
    more = (rows[f"{name}weights"] - 1)[..., None].astype(empty.dtype)
    return text._replace(tokens=text.tokens + more * (text.tokens - empty))


def _end_of_rest(
    guidance: Guidance, settings: SamplingConfig, num_steps: Int[Array, ""]
) -> Float[Array, ""] | None:
    """The time above which no step is taken: between the last of those steps and the next."""
    count = guidance.zero_star.zero_steps if guidance.zero_star else 0
    if count == 0:
        return None
    last, following = (settings.grid(jnp.int32(i), num_steps) for i in (count - 1, count))
    return (last + following) / 2


def _course(drawing: Drawing, frozen: Any, rows: dict[str, Any]) -> dict[str, Any]:
    """From where to where the loop goes: from noise to data, or the other way."""
    settings = drawing.settings
    by = drawing.decode_by or "whole"
    source = _source(drawing.task, frozen, rows, by, settings.seamless)
    if isinstance(drawing.solver, DDIMInverse):
        assert source is not None
        return {"grid": reversed_grid(settings.grid), "noise": source.x0, "unit_noise": True}
    drawn = "noise" not in rows
    return {
        "grid": settings.grid,
        "noise": noise_from_seeds(rows["seeds"], drawing.shape) if drawn else rows["noise"],
        "unit_noise": settings.unit_noise,
        "source": source,
    }


def _undecoded(
    drawing: Drawing, num_steps: Int[Array, ""], x: Float[Array, "k b i j c"]
) -> Float[Array, "k b i j c"]:
    """Latents as they are, and noise as `sample` takes it: of unit variance."""
    settings = drawing.settings
    if not isinstance(drawing.solver, DDIMInverse) or settings.unit_noise:
        return x
    return x / drawing.task.objective.schedule.sigma(settings.grid(jnp.int32(0), num_steps))


def _images(
    drawing: Drawing, by: VaeMode, frozen: Any, rows: dict[str, Any], x: Float[Array, "k b i j c"]
) -> Float[Array, "k b h w 3"]:
    """What was drawn, decoded, from 0 to 1."""
    flat = x.reshape(-1, *x.shape[2:])
    images = drawing.task.decode(frozen, flat, by, drawing.settings.seamless)
    images = images.reshape(*x.shape[:2], *images.shape[1:])
    images = jnp.clip(images / 2 + 0.5, 0, 1)
    if "mask" not in rows:
        return images
    anew = rows["mask"][..., None]  # latents keep an image about as it is, pixels exactly
    return anew * images + (1 - anew) * rows["image"] / 255


def _source(
    task: DiffusionTask, frozen: Any, rows: dict[str, Any], by: VaeMode, wrap: Wrap
) -> Source | None:
    """The images to start from, in the space that is modelled."""
    if "image" not in rows:
        return None
    x0 = task.encode(frozen, from_uint8(rows["image"]), by=by, wrap=wrap)
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

    def call(x, t, text):
        each = jnp.tile(told, (len(x) // len(told), 1, 1, 1))  # for the negative prompts too
        return network(jnp.concatenate([x, each.astype(x.dtype)], axis=-1), t, text)

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
    clip = merge(bind_init(Clip, config), weights["clip"])
    ids = rows["clip_ids"]

    def match(x0, t):
        images = jnp.clip(task.decode(weights["frozen"], x0), -1, 1)
        seen = look(images, config.vision.image_size, cutouts, t)
        embeddings = clip(seen, ids)
        image = embeddings.image.reshape(-1, *embeddings.text.shape)
        return embeddings.logit_scale * jnp.mean(jnp.sum(image * embeddings.text, -1), 0)

    return match
