"""The compiled sampler: from token ids, seeds and images to images.

A change of `SamplerSpec` recompiles; a change of `SampleInputs` does not.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8, UInt32

from jaxdiff.distributed.replicas import per_replica
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.tiling import VaeMode
from jaxdiff.models.conditioning import (
    AESTHETIC_SCORE,
    NEGATIVE_AESTHETIC_SCORE,
    Conditioning,
    TextInputs,
    full_size_crop,
    mix,
)
from jaxdiff.models.convolutions import Wrap
from jaxdiff.models.layers import bind_init, bind_params
from jaxdiff.models.text_encoders.clip import Clip, ClipConfig
from jaxdiff.models.text_to_image import NO_WRAP, TextToImage, from_uint8
from jaxdiff.sampling.ddim_inversion import DDIMInverse, reverse_grid
from jaxdiff.sampling.feature_cache import AnyCache, SplitNetwork
from jaxdiff.sampling.guidance.cfg import (
    ComposedPrompts,
    ConditionedModel,
    GuideModel,
    guided_denoiser,
)
from jaxdiff.sampling.guidance.clip_guidance import Match, clip_views, with_clip_guidance
from jaxdiff.sampling.loop import (
    InitLatents,
    Segment,
    init_loop_state,
    noise_from_seeds,
    sample,
)
from jaxdiff.sampling.multidiffusion import Windows, windowed
from jaxdiff.sampling.sampler import ResolvedSampler, Sampler
from jaxdiff.sampling.solver import StatefulDenoiser

NUM_PROGRAMS = 16  # compiled programs in the cache


class SampleInputs(NamedTuple):
    """Inputs that do not recompile: arrays with one row per image, None where absent.

    Attributes:
      text: the prompts, tokenized or encoded.
      negative: the negative prompts, likewise, as those of `Mix` and further ones.
      seeds: of the noise.
      guidance_scale: of classifier-free guidance.
      guidance: the guidance scale that the network reads.
      mix_text: second prompts of `Mix`.
      mix_fraction: their fractions.
      composed_text: further prompts of composed prompts; its arrays are [b, k, ...].
      composed_weights: of the first prompt, then of these.
      image: to start from.
      mask: 1 where the image is replaced.
      references: reference images.
      noise: of unit variance, instead of that of the seeds.
      clip_ids: prompts for CLIP guidance.
      clip_scale: its scale.
      guide_scale: of autoguidance.
    """

    text: TextInputs | Conditioning
    negative: TextInputs | Conditioning
    seeds: UInt32[Any, " b"]
    guidance_scale: Float[Any, " b"]
    guidance: Float[Any, " b"] | None = None
    mix_text: TextInputs | Conditioning | None = None
    mix_fraction: Float[Any, " b"] | None = None
    composed_text: TextInputs | Conditioning | None = None
    composed_weights: Float[Any, "b k+1"] | None = None
    image: UInt8[Any, "b h w 3"] | None = None
    mask: Float[Any, "b h w"] | None = None
    references: tuple[UInt8[Any, "b _ _ 3"], ...] | None = None
    noise: Float[Any, "b i j c"] | None = None
    clip_ids: Int[Any, "b n"] | None = None
    clip_scale: Float[Any, " b"] | None = None
    guide_scale: Float[Any, " b"] | None = None


class Steps(NamedTuple):
    """The steps of each replica, counted from 0; one with begin == end is idle.

    Attributes:
      num_steps: of the time grid.
      first: the first step of the run, above 0 for runs that start from an image or take over.
      last: the step after the last of the run, below num_steps for runs that hand over.
      begin: the first step of this segment.
      end: the step after its last.
    """

    num_steps: Int[Any, "*replicas"]
    first: Int[Any, "*replicas"]
    last: Int[Any, "*replicas"]
    begin: Int[Any, "*replicas"]
    end: Int[Any, "*replicas"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """Static arguments of a program, beside the batch size.

    Attributes:
      model: the model; its name and sampler are ignored.
      sampler: settings; those in `SampleInputs` and `Steps` are ignored.
      shape: of the latents, [h, w, c].
      mesh: the devices; each replica of the model has its own images.
      is_latent: return latents (of `DDIMInverse`: noise) rather than images.
      clip: the model of CLIP guidance.
      guide: the model of autoguidance.
      windows: of MultiDiffusion.
      num_snapshots: number of intermediate estimates, returned instead of the image.
    """

    model: TextToImage
    sampler: ResolvedSampler
    shape: tuple[int, int, int]
    mesh: Mesh
    is_latent: bool = False
    clip: ClipConfig | None = None
    guide: TextToImage | None = None
    windows: Windows | None = None
    num_snapshots: int = 0

    def __post_init__(self):
        guidance = dataclasses.replace(self.sampler.guidance, guide=None)
        if guidance.clip is not None:
            clip = dataclasses.replace(guidance.clip, model="", scale=0.0)
            guidance = dataclasses.replace(guidance, clip=clip)
        if guidance.true_cfg_scale is not None:
            guidance = dataclasses.replace(guidance, true_cfg_scale=1.0)
        sampler = dataclasses.replace(
            self.sampler,
            num_steps=1,
            guidance_scale=1.0,
            guidance=guidance,
            overlap=None,
            denoising_interval=(float(self.sampler.denoising_interval[0] > 0), 1.0),
        )
        object.__setattr__(self, "sampler", sampler)
        object.__setattr__(self, "model", anonymous(self.model))
        if self.guide is not None:
            object.__setattr__(self, "guide", anonymous(self.guide))

    @property
    def network_shape(self) -> tuple[int, int]:
        """Height and width of the network's input: the latents, or a window of them."""
        windows = self.windows
        return (windows.height, windows.width) if windows else self.shape[:2]

    @property
    def num_tokens(self) -> int:
        """Image tokens that the network reads."""
        height, width = self.network_shape
        return self.model.denoiser.num_tokens(height=height, width=width)

    def time(self, i: int, num_steps: Int[Array, ""]) -> Float[Array, ""]:
        """The time before step i."""
        return self.sampler.grid(jnp.int32(i), num_steps, self.num_tokens)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in dataclasses.fields(self)))

    def __hash__(self) -> int:
        """Hash all fields, once."""
        return self._hash


def anonymous(model: TextToImage) -> TextToImage:
    """Return a model without what its programs do not depend on: name and default sampler."""
    return dataclasses.replace(model, name="", sampler=Sampler())


@functools.lru_cache(maxsize=NUM_PROGRAMS)
def compiled_sampler(spec: SamplerSpec) -> Any:
    """Return the jitted sampler of a specification; the batch size is static too.

    It is called as (params, inputs, steps, state). params is the model's tree, with those of the
    auxiliary models at `clip` and `guide`; steps has one entry per replica; state is the result of
    the last segment, and any of its shapes in the first. It returns images [n, 1, ...] or snapshots
    [n, k, ...], zero before the last step, and the state, whose last element ends with the last
    estimate of x0. Without a state it takes no step, and returns one: its `eval_shape` gives the
    shapes without the time to trace the network and the decoder.
    """

    def run(params, inputs, steps, state):
        denoiser = _denoiser(spec, params, inputs, steps.num_steps)
        start = _start(spec, params, inputs, steps.first)
        solver, kept = spec.sampler.solver, max(spec.num_snapshots, 1)
        if state is None:
            return None, init_loop_state(denoiser, solver, start["noise"], kept)
        sampled = sample(
            denoiser,
            solver,
            spec.model.schedule,
            num_steps=steps.num_steps,
            seeds=inputs.seeds,
            num_snapshots=kept,
            resample_steps=spec.sampler.resample_steps,
            segment=Segment(steps.begin, steps.end, state),
            num_tokens=spec.num_tokens,
            **start,
        )
        x = sampled.snapshots if spec.num_snapshots else sampled.images[None]

        def finish():
            if spec.is_latent:
                return _unit_noise(spec, steps.num_steps, x).swapaxes(0, 1)
            return _decode(spec, params, inputs, x).swapaxes(0, 1)

        def nothing():
            made = jax.eval_shape(finish)
            return jnp.zeros(made.shape, made.dtype)

        finished = (steps.begin < steps.end) & (steps.end == steps.last)
        return jax.lax.cond(finished, finish, nothing), sampled.state

    def run_replica(params, inputs, steps, state):
        images, state = run(params, inputs, *jax.tree.map(lambda x: x[0], (steps, state)))
        return images, jax.tree.map(lambda x: x[None], state)

    return per_replica(run_replica, spec.mesh)


def _denoiser(
    spec: SamplerSpec, params: Mapping[str, Any], inputs: SampleInputs, num_steps: Int[Array, ""]
) -> StatefulDenoiser:
    """Return the guided denoiser."""
    model, windows, guidance = spec.model, spec.windows, spec.sampler.guidance
    # The size condition is that of the network's input.
    height, width = (side * model.downsampling for side in spec.network_shape)
    wrap = NO_WRAP if windows else spec.sampler.wrap
    vae_mode, cache, guide = spec.sampler.vae_mode, spec.sampler.cache, None
    if spec.guide is not None:
        assert inputs.guide_scale is not None
        own = params["guide"]
        conditioned = _conditioned(spec.guide, own, inputs, (height, width), wrap, vae_mode)
        guide = GuideModel(conditioned, inputs.guide_scale[0])
    denoiser = guided_denoiser(
        _conditioned(model, params, inputs, (height, width), wrap, vae_mode, cache),
        guidance,
        inputs.guidance_scale,
        threshold=spec.sampler.threshold,
        guide=guide,
        zero_init_until=_zero_init_until(spec, num_steps),
        classifier_free=guidance.is_classifier_free(model.denoiser.guidance_embedding),
    )
    if windows is not None:
        denoiser = windowed(denoiser, windows, *spec.shape[:2])
    if guidance.clip is None or spec.clip is None:
        return denoiser
    assert inputs.clip_scale is not None
    return with_clip_guidance(
        denoiser,
        _clip_match(spec, params, inputs, guidance.clip.cutouts),
        model.schedule,
        inputs.clip_scale[0],
        interval=guidance.clip.interval,
    )


def _conditioned(
    model: TextToImage,
    params: Mapping[str, Any],
    inputs: SampleInputs,
    size: tuple[int, int],
    wrap: Wrap,
    vae_mode: VaeMode,
    cache: AnyCache | None = None,
) -> ConditionedModel:
    """Return a model's network with the conditioning of all prompts.

    Raises:
      UserError: the network has no features to cache.
    """
    reference, positions = _references(model, params, inputs, vae_mode)
    shared = Conditioning(
        guidance=inputs.guidance,
        concat=_inpainting_channels(model, params, inputs, wrap, vae_mode),
        reference=reference,
        reference_positions=positions,
    )

    def attach(cond: Conditioning, count: int, score: float) -> Conditioning:
        tiles = count // len(inputs.seeds)
        tiled = jax.tree.map(lambda x: jnp.tile(x, (tiles, *[1] * (x.ndim - 1))), shared)
        return cond._replace(
            size_crop=full_size_crop(*size, count),
            aesthetic_score=jnp.full(count, score),
            guidance=tiled.guidance,
            concat=tiled.concat,
            reference=tiled.reference,
            reference_positions=tiled.reference_positions,
        )

    def encode(text: TextInputs | Conditioning) -> Conditioning:
        return text if isinstance(text, Conditioning) else model.encode_text(params, text)

    count, composed = len(inputs.seeds), None
    cond = encode(inputs.text)
    if inputs.mix_text is not None and inputs.mix_fraction is not None:
        cond = mix(cond, encode(inputs.mix_text), inputs.mix_fraction)
    if inputs.composed_text is not None and inputs.composed_weights is not None:
        parts = inputs.composed_weights.shape[1] - 1
        # One prompt after another, [k b ...], as encoders have no axis for k.
        flat = jax.tree.map(
            lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), inputs.composed_text
        )
        further = attach(encode(flat), parts * count, AESTHETIC_SCORE)
        further = jax.tree.map(lambda x: x.reshape(parts, count, *x.shape[1:]), further)
        composed = ComposedPrompts(further, inputs.composed_weights)
    uncond = encode(inputs.negative)
    network = model.network(params, wrap)
    splits: bool = isinstance(network, SplitNetwork)
    if cache is not None and not splits:
        raise UserError(
            f"{type(network).__name__} has no features to cache: expected a network with the "
            "methods shallow, deep and finish; leave cache out."
        )
    return ConditionedModel(
        network=network,
        prediction=model.prediction,
        schedule=model.schedule,
        cond=attach(cond, count, AESTHETIC_SCORE),
        uncond=attach(uncond, count, NEGATIVE_AESTHETIC_SCORE),
        composed=composed,
        cache=cache,
    )


def _inpainting_channels(
    model: TextToImage,
    params: Mapping[str, Any],
    inputs: SampleInputs,
    wrap: Wrap,
    vae_mode: VaeMode,
) -> Float[Array, "b i j k"] | None:
    """Return mask and masked latents for inpainting networks; None for others."""
    if not model.is_inpainting:
        return None
    assert inputs.image is not None
    assert inputs.mask is not None
    around = from_uint8(inputs.image) * (inputs.mask < 0.5)[..., None]
    mask = latent_mask(inputs.mask, model.downsampling)
    latents = model.encode(params, around, vae_mode=vae_mode, wrap=wrap)
    return jnp.concatenate([mask, latents], axis=-1)


def _references(
    model: TextToImage, params: Mapping[str, Any], inputs: SampleInputs, vae_mode: VaeMode
) -> tuple[Float[Array, "b m r"] | None, Int[Array, "b m axes"] | None]:
    """Return the tokens and positions of the reference images, if there are some."""
    if inputs.references is None or not model.denoiser.max_references:
        return None, None
    latents = [
        model.encode(params, from_uint8(images), vae_mode=vae_mode) for images in inputs.references
    ]
    return model.denoiser.reference_tokens(latents)


def latent_mask(mask: Float[Array, "n h w"], downsampling: int) -> Float[Array, "n i j 1"]:
    """Downsample a mask: a latent is replaced if any of its pixels is."""
    n, height, _ = mask.shape
    cells = mask.reshape(n, height // downsampling, downsampling, -1, downsampling)
    return jnp.max(cells, axis=(2, 4))[..., None]


def _zero_init_until(spec: SamplerSpec, num_steps: Int[Array, ""]) -> Float[Array, ""] | None:
    """Return the time halfway between the last step of velocity 0 and the next step."""
    count = spec.sampler.guidance.zero_steps
    if count == 0:
        return None
    return (spec.time(count - 1, num_steps) + spec.time(count, num_steps)) / 2


def _start(
    spec: SamplerSpec, params: Mapping[str, Any], inputs: SampleInputs, first: Int[Array, ""]
) -> dict[str, Any]:
    """Return the arguments of `sample` for its initial state: noise, or data."""
    sampler = spec.sampler
    init = _init_latents(spec, params, inputs, first)
    if isinstance(sampler.solver, DDIMInverse):
        assert init is not None
        return {"grid": reverse_grid(sampler.grid), "noise": init.x0, "init_noise": "unit"}
    noise = inputs.noise
    return {
        "grid": sampler.grid,
        "noise": noise_from_seeds(inputs.seeds, spec.shape) if noise is None else noise,
        "init_noise": sampler.init_noise,
        "init": init,
    }


def _init_latents(
    spec: SamplerSpec, params: Mapping[str, Any], inputs: SampleInputs, first: Int[Array, ""]
) -> InitLatents | None:
    """Return the latents of the initial images, or of the run before."""
    if spec.sampler.denoising_interval[0] > 0:
        assert inputs.noise is not None
        return InitLatents(inputs.noise, first_step=first, has_noise=True)
    if inputs.image is None:
        return None
    model, sampler = spec.model, spec.sampler
    image = from_uint8(inputs.image)
    x0 = model.encode(params, image, vae_mode=sampler.vae_mode, wrap=sampler.wrap)
    if inputs.mask is None:
        return InitLatents(x0, first_step=first)
    # Inpainting networks read the mask themselves.
    mask = None if model.is_inpainting else latent_mask(inputs.mask, model.downsampling)
    return InitLatents(x0, mask, first_step=first, from_noise=True)


def _unit_noise(
    spec: SamplerSpec, num_steps: Int[Array, ""], x: Float[Array, "k b i j c"]
) -> Float[Array, "k b i j c"]:
    """Scale inverted noise to unit variance, as `sample` expects; other latents are unchanged."""
    sampler = spec.sampler
    if not isinstance(sampler.solver, DDIMInverse) or sampler.init_noise == "unit":
        return x
    return x / spec.model.schedule.sigma(spec.time(0, num_steps))


def _decode(
    spec: SamplerSpec,
    params: Mapping[str, Any],
    inputs: SampleInputs,
    x: Float[Array, "k b i j c"],
) -> Float[Array, "k b h w 3"]:
    """Decode latents to images in [0, 1]; pixels that the mask keeps are exact."""
    sampler = spec.sampler
    flat = x.reshape(-1, *x.shape[2:])
    images = spec.model.decode(params, flat, vae_mode=sampler.vae_mode, wrap=sampler.wrap)
    images = images.reshape(*x.shape[:2], *images.shape[1:])
    images = jnp.clip(images / 2 + 0.5, 0, 1)
    if inputs.mask is None or inputs.image is None:
        return images
    mask = inputs.mask[..., None]
    return mask * images + (1 - mask) * inputs.image / 255


def _clip_match(
    spec: SamplerSpec, params: Mapping[str, Any], inputs: SampleInputs, cutouts: int
) -> Match:
    """Return CLIP's logits for estimates of x0 and the prompts."""
    config, ids = spec.clip, inputs.clip_ids
    assert config is not None
    clip = bind_params(bind_init(Clip, config), params["clip"])

    def match(x0, t):
        images = jnp.clip(spec.model.decode(params, x0), -1, 1)
        views = clip_views(images, config.vision.image_size, cutouts, t)
        embeddings = clip(views, ids)
        image = embeddings.image.reshape(-1, *embeddings.text.shape)
        return embeddings.logit_scale * jnp.mean(jnp.sum(image * embeddings.text, -1), 0)

    return match


ImageProgram = Callable[[Any, Array], Array]


@functools.lru_cache(maxsize=NUM_PROGRAMS)
def compiled_autoencoder(model: TextToImage, mesh: Mesh) -> ImageProgram:
    """Return the jitted map from uint8 images to latents, without noise, and back."""

    def autoencode(params, images):
        return _to_levels(model.decode(params, model.encode(params, from_uint8(images))))

    return per_replica(autoencode, mesh)


@functools.lru_cache(maxsize=NUM_PROGRAMS)
def compiled_decoder(model: TextToImage, mesh: Mesh, vae_mode: VaeMode) -> ImageProgram:
    """Return the jitted map from latents to uint8 images."""

    def decode(params, latents):
        return _to_levels(model.decode(params, latents, vae_mode=vae_mode))

    return per_replica(decode, mesh)


def _to_levels(images: jax.Array) -> jax.Array:
    return jnp.rint((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)
