"""The pipeline: prompts to images."""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float32, PyTree

from jaxdiff.config.checked import check_value
from jaxdiff.config.fields import Count
from jaxdiff.data.nearest_words import nearest_words, with_nearest
from jaxdiff.data.text_tokenizer import TextTokenizer, words_of
from jaxdiff.distributed.mesh import REPLICATED, MeshConfig, num_replicas
from jaxdiff.distributed.replicas import local_mesh, shard
from jaxdiff.distributed.sharding import check_mesh
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.base import AutoencoderSpec
from jaxdiff.models.autoencoders.tiling import VaeMode
from jaxdiff.models.layers import ComputeType, cast
from jaxdiff.models.quantized import QuantizedType
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.auxiliary_models import load_clip, load_guide
from jaxdiff.pipelines.batching import (
    Callback,
    SampleCall,
    Watch,
    as_preview,
    default_batch_size,
    in_full_batches,
    make_batches,
    sample_batches,
    warn_of_broken,
)
from jaxdiff.pipelines.exported import Programs, StoredSampler
from jaxdiff.pipelines.input_images import InitImage, References, check_images, check_references
from jaxdiff.pipelines.inputs import (
    Integer,
    Mix,
    Number,
    Output,
    Prompt,
    SampleRequest,
    UnknownWordWarning,
    check_request,
    check_size,
    float_array,
    image_size,
    one_each,
    plain_texts,
    prompt_list,
    sample_inputs,
    seed_array,
    size_of_ratio,
    slerp,
    step_counts,
    steps_taken,
)
from jaxdiff.pipelines.program import (
    SampleInputs,
    SamplerSpec,
    compiled_autoencoder,
    compiled_decoder,
    compiled_sampler,
)
from jaxdiff.pipelines.prompt_weights import plain
from jaxdiff.pipelines.text_encoding import encode_prompts
from jaxdiff.pipelines.windows import windows_of
from jaxdiff.pretrained.bundle import Bundle, model_name, weights_fingerprint
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.loop import noise_from_seeds
from jaxdiff.sampling.sampler import Sampler


def compute_type(dtype: ComputeType | None) -> ComputeType | None:
    """Return the type to compute in: without one that of the weights, but float32 on a CPU."""
    return "float32" if dtype is None and jax.default_backend() == "cpu" else dtype


class Pipeline:
    """A text-to-image model, ready to sample.

    `pipe(prompts)` returns images. Prompts, seeds, guidance scales and the number of steps are
    arguments of one compiled loop: other values, or another number of images, do not recompile. All
    bits of an image depend only on its prompt, seed and settings, not on its index, on other
    images, or on the number of devices.

    Attributes:
      spec: the model.
      params: its parameters, on the devices.
      tokenizers: by text encoder.
      dtype: to compute in; None is that of the weights.
      quantize: type of the stored kernels; None is that of the weights.
      mesh: how devices share the model.
      offload_text: whether text encoders are on the devices only while they encode prompts.
      types: dataclasses that the specifications of further models may name.
    """

    spec: TextToImage
    params: PyTree
    tokenizers: Mapping[str, TextTokenizer]
    dtype: ComputeType | None
    quantize: QuantizedType | None
    mesh: MeshConfig
    offload_text: bool
    types: tuple[type, ...]
    _programs: Programs | None

    def __init__(
        self,
        bundle: Bundle,
        *,
        dtype: ComputeType | None = None,
        quantize: QuantizedType | None = None,
        devices: Sequence[Any] | None = None,
        mesh: MeshConfig = REPLICATED,
        offload_text: bool = False,
        types: Sequence[type] = (),
    ):
        spec = bundle.spec
        if not isinstance(spec, TextToImage):
            raise UserError(
                f"The model is of type {type(spec).__name__}: expected a text-to-image model; give "
                "the folder of one."
            )
        new_tokens = bundle.params.get("added_tokens", {}).values()
        added = max((len(rows) for rows in new_tokens), default=0)
        spec.conditioner.check_tokenizers(bundle.tokenizers, added)
        dtype = compute_type(dtype)
        self.spec, self.tokenizers, self.dtype = spec, bundle.tokenizers, dtype
        self.quantize, self.types, self._programs = quantize, tuple(types), None
        self.mesh, self._mesh, self.offload_text = mesh, local_mesh(devices, mesh), offload_text
        params = bundle.params if dtype is None else cast(bundle.params, dtype)
        axes = spec.param_axes()
        check_mesh(params, axes, self._mesh, splits_tokens=True)
        if quantize is not None:
            params = spec.quantize(params, check_value("quantize", quantize, QuantizedType))
        stays = {"text_encoders"} if offload_text else set()
        here = {name: part for name, part in params.items() if name not in stays}
        self.params = {
            **shard(here, self._mesh, axes),
            **{name: jax.device_get(params[name]) for name in stays},
        }
        self._load_guide = functools.lru_cache(maxsize=2)(
            lambda model: load_guide(model, self.bundle, self.dtype, self._mesh, self.types)
        )

    @property
    def bundle(self) -> Bundle:
        """The model, in the compute type."""
        return Bundle(self.spec, self.params, self.tokenizers)

    @property
    def devices(self) -> list[Any]:
        """The devices."""
        return list(self._mesh.devices.flat)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights, in hex."""
        return weights_fingerprint(self.params)

    @property
    def image_size(self) -> int:
        """Side of the training images, the default of `size`."""
        return self.spec.image_size

    def with_bundle(self, bundle: Bundle) -> "Pipeline":
        """Return a pipeline of another model with this one's types, devices and programs."""
        names = ("dtype", "quantize", "mesh", "offload_text", "types")
        kinds = {name: getattr(self, name) for name in names}
        return Pipeline(bundle, devices=self.devices, **kinds).with_programs(self._programs)

    def with_programs(self, programs: Programs | None) -> "Pipeline":
        """Return this pipeline with stored programs, or without."""
        pipe = copy.copy(self)
        pipe._programs = programs
        return pipe

    def batch_size(self, width: int, height: int) -> int:
        """Return how many images of a size each replica samples at a time by default."""
        stored, size = self._programs, (width, height)
        own = stored.batch_size(self.spec, self.params, size, self._mesh) if stored else None
        return own or default_batch_size(*size)

    def with_autoencoder(self, model: epath.PathLike) -> "Pipeline":
        """Return a pipeline with another autoencoder, such as a tiny one for previews.

        Args:
          model: folder or hub id of an autoencoder: diffusers' AutoencoderKL or AutoencoderTiny, or
            an exported one; or the file of FLUX.1's, Z-Image's or FLUX.2's.

        Raises:
          UserError: it cannot be read, or its latents have another shape.
        """
        spec, params, _ = load_bundle(model, types=self.types)
        own = self.spec.autoencoder
        if (
            own is None
            or not isinstance(spec, AutoencoderSpec)
            or (own.latent_channels, own.downsampling) != (spec.latent_channels, spec.downsampling)
        ):
            raise UserError(
                f"{model} is no autoencoder for the latents of {model_name(self.spec)}: expected "
                "one with as many channels and the same downsampling."
            )
        return self.with_bundle(
            self.bundle._replace(
                spec=dataclasses.replace(self.spec, autoencoder=spec),
                params={**self.params, "autoencoder": params},
            )
        )

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        negative_prompt: str | Sequence[str | None] | None = None,
        seeds: Integer | Iterable[Integer] | None = None,
        num_steps: Integer | Iterable[Integer] | None = None,
        guidance_scale: Number | Iterable[Number] | None = None,
        size: tuple[int, int] | None = None,
        latents: np.ndarray | jax.Array | None = None,
        init: InitImage | References | None = None,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        output: Output = "uint8",
        batch_size: int | None = None,
        callback: Callback | None = None,
    ) -> np.ndarray:
        """Sample one image for each prompt.

        Args:
          prompts: one prompt or n; text beyond the encoder's length is cut off (`truncated`).
            Words may have a weight, `a (flat:1.3) drawing`, a prompt may be composed of several,
            `"a cat":1 "flat":-0.5`, and `Mix` interpolates two.
          negative_prompt: guides away from a text, one for all or one each. None is absent, which
            some model families treat differently from "".
          seeds: one for all or one each, from 0 to 2**32 - 1; 0 to n - 1 by default.
          num_steps: of the solver, one for all or one each.
          guidance_scale: of classifier-free guidance, one for all or one each; 1 is unguided, and
            so is less for Stable Diffusion and XL. If all are unguided, another program evaluates
            the prompts alone, at half the cost. Networks with a guidance embedding read it.
          size: width and height; by default those of `latents` or `init`, or the training images'.
          latents: initial noise [n, i, j, c] of unit variance, instead of that of the seeds.
          init: images to start from, with a mask and a strength, or reference images.
          sampler: settings such as the solver; another solver compiles another program.
          guidance: options of guidance other than the scale.
          output: "uint8", "float" (float32 in [0, 1]), or "latents": latents, or pixels in [-1, 1].
          batch_size: images that each replica of the model samples at a time; the default depends
            on size and kind of device. Another size compiles another program with different
            rounding, about 1e-5 of an image's range.
          callback: called as (step, images) after every step with the estimates of the images in
            progress, uint8 [m, h, w, 3], or a `Preview`.

        Settings that are None inherit those of `sampler`, then of the model.

        Returns:
          Images [n, h, w, 3], or latents.

        Raises:
          UserError: an invalid argument.
        """
        request = SampleRequest.of(
            prompts=prompts,
            negative_prompt=negative_prompt,
            seeds=seeds,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            size=size,
            latents=latents,
            init=init,
            sampler=sampler,
            guidance=guidance,
            output=output,
            batch_size=batch_size,
            callback=callback,
        )
        return self._sample(request)[:, 0]

    def snapshots(
        self, prompts: Prompt | Sequence[Prompt], num: int, **arguments: Any
    ) -> np.ndarray:
        """Sample, and return intermediate estimates of the images.

        Args:
          prompts: as for `__call__`.
          num: k, number of estimates at equal distances; the last is that of the last step.
          arguments: others of `__call__`.

        Returns:
          Estimates [k, n, h, w, 3].

        Raises:
          UserError: num is less than 1, or as `__call__` raises.
        """
        num = check_value("num", num, Count)
        return self._sample(SampleRequest.of(prompts=prompts, **arguments), num).swapaxes(0, 1)

    def _sample(self, request: SampleRequest, num_snapshots: int = 0) -> np.ndarray:
        """Return images [n, 1, ...] or snapshots [n, k, ...]."""
        self._warn_of_unknown_words(prompt_list(request.prompts))
        call = self.prepare(request, num_snapshots)
        stored = self._programs
        program = StoredSampler(call.spec, stored) if stored else compiled_sampler(call.spec)
        sampled = sample_batches(program, call, self._watch(request.callback, call))
        warn_of_broken(sampled)
        if request.output == "uint8":
            return np.rint(np.nan_to_num(sampled, posinf=1, neginf=0) * 255).astype(np.uint8)
        return sampled

    def prepare(self, request: SampleRequest, num_snapshots: int = 0) -> SampleCall:
        """Return what a request runs, without running it.

        Raises:
          UserError: an invalid argument.
        """
        spec, sampler = self.spec, request.resolve_sampler(self.spec.sampler)
        prompts = prompt_list(request.prompts)
        n, init = len(prompts), request.init_image
        check_request(request, spec, sampler)
        steps = step_counts(
            sampler.num_steps if request.num_steps is None else request.num_steps, n
        )
        for count in {min(steps), max(steps)}:
            sampler.check_steps(count)
        images = None if init is None else check_images(init.image, n)
        references = request.references and check_references(request.references, n, spec)
        size = image_size(request, spec, images, references)
        batch_size = request.batch_size or self.batch_size(*size)
        shape = spec.latent_shape(size[1], size[0])
        inputs = sample_inputs(request, spec, self.tokenizers, sampler, images, shape)._replace(
            references=references
        )
        if self.offload_text:
            inputs = encode_prompts(spec, self.params, self._mesh, inputs, batch_size)
        guidance = sampler.guidance.at_scales(inputs.guidance_scale)
        program_spec = SamplerSpec(
            model=spec,
            sampler=dataclasses.replace(sampler, guidance=guidance),
            shape=shape,
            mesh=self._mesh,
            is_latent=request.output == "latents",
            windows=windows_of(spec, size, sampler, batch_size),
            num_snapshots=num_snapshots,
        )
        program_spec, params, inputs = self._with_auxiliary_models(
            program_spec, inputs, prompts, sampler.guidance
        )
        batches = make_batches(
            steps, steps_taken(init, steps, sampler, program_spec.num_tokens), batch_size
        )
        return SampleCall(program_spec, params, inputs, batches, batch_size)

    def _warn_of_unknown_words(self, prompts: Sequence[Prompt]) -> None:
        unknown = {k: near for prompt in prompts for k, near in self.unknown_words(prompt).items()}
        if unknown:
            warnings.warn(
                f"No caption in training had {with_nearest(unknown)}: use words of the "
                f"`vocabulary` of {model_name(self.spec)}.",
                UnknownWordWarning,
                stacklevel=4,
            )

    def _watch(self, callback: Callback | None, call: SampleCall) -> Watch | None:
        if callback is None:
            return None
        preview = as_preview(callback)
        decoder: Pipeline = preview.decoder or self

        def show(step: int, x0: np.ndarray, indices: Sequence[int]) -> None:
            images = decoder.decode(x0, call.size, call.spec.sampler.vae_mode)
            preview.show(step, images, indices)

        return Watch(preview.every, show)

    def _with_auxiliary_models(
        self,
        program: SamplerSpec,
        inputs: SampleInputs,
        prompts: Sequence[Prompt],
        guidance: Guidance,
    ) -> tuple[SamplerSpec, PyTree, SampleInputs]:
        """Add the models of CLIP guidance and autoguidance, with their parameters and inputs."""
        n, params = len(prompts), self.params
        if self.offload_text:
            params = {name: part for name, part in params.items() if name != "text_encoders"}
        if guidance.clip is not None:
            clip = load_clip(guidance.clip.model, self._mesh)
            params = {**params, "clip": clip.params}
            texts = [prompt.a if isinstance(prompt, Mix) else prompt for prompt in prompts]
            inputs = inputs._replace(
                clip_ids=clip.tokenizer([plain(text) for text in texts]),
                clip_scale=np.full(n, guidance.clip.scale, np.float32),
            )
            program = dataclasses.replace(program, clip=clip.config)
        if guidance.guide is not None:
            if self.offload_text:
                raise UserError(
                    "Autoguidance reads the prompts by text encoders of its own, but offload_text "
                    "encodes them apart: leave one of the two out."
                )
            guide = self._load_guide(guidance.guide.model)
            params = {**params, "guide": guide.params}
            inputs = inputs._replace(guide_scale=np.full(n, guidance.guide.scale, np.float32))
            program = dataclasses.replace(program, guide=guide.spec)
        return program, params, inputs

    def noise(
        self,
        seeds: Integer | Iterable[Integer],
        *,
        variation_seeds: Integer | Iterable[Integer] | None = None,
        variation_strength: Number | Iterable[Number] = 0.1,
        size: tuple[int, int] | None = None,
    ) -> Float32[np.ndarray, "n i j c"]:
        """Return the noise of seeds, for `latents`.

        Args:
          seeds: n of them.
          variation_seeds: other seeds, one for all or one each, whose noise is interpolated with.
          variation_strength: fraction of the other noise, one for all or one each.
          size: width and height of the image; the training images' by default.

        Raises:
          UserError: a seed out of range, lengths or a size that do not fit.
        """
        width, height = check_size(size or (self.image_size, self.image_size), self.spec)
        shape = self.spec.latent_shape(height, width)
        values = seed_array(seeds if isinstance(seeds, Iterable) else [seeds])
        own = np.asarray(noise_from_seeds(jnp.asarray(values), shape))
        if variation_seeds is None:
            return own
        others = seed_array(one_each("variation_seeds", variation_seeds, len(own)))
        fractions = float_array("variation_strength", variation_strength, len(own))
        other = np.asarray(noise_from_seeds(jnp.asarray(others), shape))
        each = zip(own, other, fractions.tolist(), strict=True)
        return np.stack([slerp(*one) for one in each])

    def truncated(self, prompt: Prompt) -> list[str]:
        """Return the names of the text encoders for which a prompt is too long, and is cut off."""
        texts, pairs = plain_texts(prompt), self.tokenizers.items()
        return [name for name, one in pairs if any(one.truncated(text) for text in texts)]

    @property
    def vocabulary(self) -> frozenset[str] | None:
        """The words of the training captions, in lower case; None if unknown."""
        known = [tokenizer.words for tokenizer in self.tokenizers.values()]
        if not known or any(words is None for words in known):
            return None
        return frozenset().union(*(words or () for words in known))

    def unknown_words(self, prompt: Prompt) -> dict[str, tuple[str, ...]]:
        """Return the words of a prompt that are not in `vocabulary`, with the nearest that are.

        It is empty if the vocabulary is unknown; a word to which none is near has ().
        """
        known = self.vocabulary
        if known is None:
            return {}
        words = dict.fromkeys(word for text in plain_texts(prompt) for word in words_of(text))
        unknown = [word for word in words if word not in known]
        related = {k: v for one in self.tokenizers.values() for k, v in (one.related or {}).items()}
        return {word: nearest_words(word, known, related) for word in unknown}

    def size_of(self, ratio: str) -> tuple[int, int]:
        """Return the width and height of an aspect ratio such as "16:9" at the training area.

        Raises:
          UserError: no such ratio, or one too far from square.
        """
        return size_of_ratio(ratio, self.image_size**2, self.spec.size_multiple)

    def autoencode(self, images: np.ndarray) -> np.ndarray:
        """Encode and decode images uint8 [n, h, w, 3]; models on pixels return them unchanged.

        Raises:
          UserError: images of another shape or type.
        """
        if self.spec.autoencoder is None:
            return images
        images = check_images(images)
        size = default_batch_size(*images.shape[2:0:-1]) * num_replicas(self._mesh)
        autoencode = functools.partial(compiled_autoencoder(self.spec, self._mesh), self.params)
        return in_full_batches(autoencode, size, images)

    def decode(
        self, latents: np.ndarray, batch_size: int | None = None, vae_mode: VaeMode = "full"
    ) -> np.ndarray:
        """Decode latents [n, i, j, c] of unit variance, or pixels, to images uint8 [n, h, w, 3]."""
        height, width = (side * self.spec.downsampling for side in latents.shape[1:3])
        size = (batch_size or default_batch_size(width, height)) * num_replicas(self._mesh)
        decode = functools.partial(compiled_decoder(self.spec, self._mesh, vae_mode), self.params)
        return in_full_batches(decode, size, latents)
