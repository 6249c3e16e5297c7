"""Check a user's arguments, and convert them to the program's arrays."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32, UInt32

from jaxdiff.config.checked import check_value, checked
from jaxdiff.config.fields import Count, Natural, Seed, Text
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.errors import FieldError, UserError
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.batching import Callback
from jaxdiff.pipelines.input_images import InitImage, Number, References, check_masks
from jaxdiff.pipelines.program import SampleInputs
from jaxdiff.pipelines.prompt_weights import parse_prompt, tokenize
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.sampler import ResolvedSampler, Sampler, Steps

IMAGE_STRENGTH = 0.6

Integer = int | np.integer
Output = Literal["uint8", "float", "latents"]


@checked
@dataclass(frozen=True, kw_only=True)
class Mix:
    """An interpolation between two encoded prompts: (1 - fraction) a + fraction b.

    Attributes:
      a: a prompt, which may be composed.
      b: a prompt, not composed.
      fraction: of b, from 0 to 1.

    Raises:
      UserError: a prompt is no text, or the fraction is not finite.
    """

    a: str
    b: str
    fraction: float = 0.5

    def __post_init__(self):
        for prompt in (self.a, self.b):
            check_prompt("A prompt of Mix", prompt)


Prompt = str | Mix


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class SampleRequest:
    """The arguments of `Pipeline.__call__`, which describes them."""

    prompts: Prompt | Iterable[Prompt]
    negative_prompt: str | Iterable[str | None] | None = None
    seeds: Integer | Iterable[Integer] | None = None
    num_steps: Integer | Iterable[Integer] | None = None
    guidance_scale: Number | Iterable[Number] | None = None
    size: tuple[int, int] | None = None
    latents: np.ndarray | jax.Array | None = None
    init: InitImage | References | None = None
    sampler: Sampler | None = None
    guidance: Guidance | None = None
    output: Output = "uint8"
    batch_size: Count | None = None
    callback: Callback | None = None

    def __post_init__(self):
        # Once, as an iterator can be read.
        object.__setattr__(self, "prompts", prompt_list(self.prompts))

    @property
    def init_image(self) -> InitImage | None:
        """The images to start from."""
        return self.init if isinstance(self.init, InitImage) else None

    @property
    def references(self) -> References | None:
        """The reference images."""
        return self.init if isinstance(self.init, References) else None

    @classmethod
    def of(cls, **arguments: Any) -> "SampleRequest":
        """Return the request of a call; errors have the names of its arguments."""
        try:
            return cls(**arguments)
        except FieldError as error:
            raise error.called(error.field) from None

    def resolve_sampler(self, model: Sampler) -> ResolvedSampler:
        """Return the settings; those that are None inherit the model's."""
        sampler = Sampler(guidance=self.guidance).inherit(
            (self.sampler or Sampler()).inherit(model)
        )
        return sampler.resolve()


def check_request(request: SampleRequest, spec: TextToImage, sampler: ResolvedSampler) -> None:
    """Raise `UserError` for arguments that contradict each other, or that the model lacks."""
    init = request.init_image
    if spec.is_inpainting and (init is None or init.mask is None):
        raise UserError(
            f"{spec.name} is for inpainting: expected init with an image and a mask, 1 where the "
            "image is replaced."
        )
    if sampler.vae_mode == "tiling" and any(sampler.wrap):
        raise UserError(
            'vae_mode is "tiling", whose tiles do not wrap: expected "slicing" or "full".'
        )
    low, high = sampler.denoising_interval
    if high < 1 and request.output != "latents":
        raise UserError(
            f"denoising_interval ends at {high:g}, where images are noisy: expected 1, or "
            'output="latents" for the model that takes over.'
        )
    if low > 0 and (request.latents is None or init is not None):
        raise UserError(
            f"denoising_interval starts at {low:g}: expected the latents of a call whose interval "
            "ends there, and no init image; give them as latents."
        )


class UnknownWordWarning(UserWarning):
    """A prompt has words that do not occur in the training captions."""


def prompt_list(prompts: Any) -> list[Prompt]:
    """Return prompts as a list.

    Raises:
      UserError: there are none, or one is neither text nor `Mix`.
    """
    found = [prompts] if isinstance(prompts, str | Mix) else _as_list("prompts", prompts)
    if not found:
        raise UserError("There is no prompt: expected at least one.")
    for prompt in found:
        if not isinstance(prompt, Mix):
            check_prompt("A prompt", prompt)
    return found


def plain_texts(prompt: Prompt) -> list[str]:
    """Return the texts of a prompt, or of both of a `Mix`, without weights."""
    texts = [prompt.a, prompt.b] if isinstance(prompt, Mix) else [prompt]
    return [part.text for text in texts for part in parse_prompt(text)]


def negative_list(negatives: Any, n: int) -> list[str | None]:
    """Return one negative prompt for each of n prompts; None is one that is not given.

    Raises:
      UserError: there are neither one nor n, or one is no text.
    """
    alone = negatives is None or isinstance(negatives, str)
    found = [negatives] if alone else _as_list("negative_prompt", negatives)
    for negative in found:
        if negative is not None:
            check_prompt("A negative_prompt", negative)
    return one_each("negative_prompt", found, n)


def _as_list(name: str, values: Any) -> list[Any]:
    if isinstance(values, bytes) or not isinstance(values, Iterable):
        raise UserError(f"{name} is {values!r}: expected a text, or a list of them.")
    return list(values)


def check_prompt(name: str, value: Any) -> None:
    """Raise `UserError` unless a prompt is text of UTF-8, neither with a NUL nor too long."""
    if not isinstance(value, str):
        raise UserError(f"{name} is {value!r}: expected a text, such as 'a cat'.")
    Text(empty=True).check(name, value, str)


def one_each(name: str, values: Any, n: int) -> list[Any]:
    """Return a list of n values; a single value, or a list of one, is repeated.

    Raises:
      UserError: there are neither one nor n.
    """
    alone = not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0
    values = [values] if alone else list(values)
    if len(values) == 1:
        return values * n
    if len(values) != n:
        raise UserError(
            f"{name} has {len(values)} values for {n} prompts: expected one, or one each."
        )
    return values


def float_array(name: str, values: Any, n: int) -> Float32[np.ndarray, " n"]:
    """Return n finite numbers, float32.

    Raises:
      UserError: there are neither one nor n, or one is no finite number.
    """
    found = [check_value(name, value, float) for value in one_each(name, values, n)]
    return np.asarray(found, np.float32)


def seed_array(values: Iterable[Integer]) -> UInt32[np.ndarray, " n"]:
    """Return seeds as an array.

    Raises:
      UserError: one is no integer, or out of range.
    """
    return np.asarray([check_value("seed", value, Seed) for value in values], np.uint32)


def step_counts(num_steps: Integer | Iterable[Integer], n: int) -> list[int]:
    """Return the number of steps of each of n images.

    Raises:
      UserError: there are neither one nor n, or one is no positive integer.
    """
    return [check_value("num_steps", count, Steps) for count in one_each("num_steps", num_steps, n)]


def first_step(strength: float, num_steps: int) -> int:
    """Return the index of the first step, later for a smaller strength; at least one is taken.

    Raises:
      UserError: strength is outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise UserError(
            f"strength is {strength}: expected a number from 0, little change, to 1, which "
            "replaces all that the mask allows."
        )
    # A product such as 0.3 * 10 may round below the integer.
    return num_steps - max(1, min(num_steps, int(strength * num_steps + 1e-6)))


def steps_taken(
    init: InitImage | None, num_steps: Sequence[int], sampler: ResolvedSampler, num_tokens: int
) -> list[tuple[int, int]]:
    """Return the index of each image's first step, and of the step after its last.

    Raises:
      UserError: a strength outside [0, 1], or neither one nor one each; or no step is left.
    """
    n = len(num_steps)
    known = {k: sampler.steps_taken(k, num_tokens) for k in set(num_steps)}
    if init is None:
        return [known[k] for k in num_steps]
    default = IMAGE_STRENGTH if init.mask is None else 1.0
    strengths = one_each("strength", default if init.strength is None else init.strength, n)
    float_array("strength", strengths, n)  # raises for what is no number
    pairs = zip(strengths, num_steps, strict=True)
    taken = [(first_step(float(s), k), known[k][1]) for s, k in pairs]
    if any(first >= last for first, last in taken):
        raise UserError(
            "strength starts after the end of denoising_interval, which leaves no step: expected a "
            "larger strength, or a later end."
        )
    return taken


def image_size(
    request: SampleRequest,
    spec: TextToImage,
    images: np.ndarray | None,
    references: Sequence[np.ndarray] | None = None,
) -> tuple[int, int]:
    """Return width and height: as requested, or of images, latents or references, or in training.

    Raises:
      UserError: they contradict each other, or are no multiples of the model's.
    """
    size = request.size
    if images is not None:
        theirs = images.shape[2], images.shape[1]
        if size is not None and tuple(size) != theirs:
            raise UserError(
                f"size is {size[0]}x{size[1]} but image is {theirs[0]}x{theirs[1]}: omit size, or "
                "resize the image."
            )
        size = theirs
    elif size is None and request.latents is not None:
        latents = np.asarray(request.latents)
        if latents.ndim != 4:
            raise UserError(f"latents are of shape {latents.shape}: expected [n, i, j, c].")
        height, width = latents.shape[1:3]
        size = width * spec.downsampling, height * spec.downsampling
    elif size is None and references:
        size = references[0].shape[2], references[0].shape[1]
    return check_size(size or (spec.image_size, spec.image_size), spec)


def check_size(size: tuple[int, int], spec: TextToImage, name: str = "size") -> tuple[int, int]:
    """Return width and height; `name` is that of the argument in messages.

    Raises:
      UserError: they are no two multiples of the model's `size_multiple`.
    """
    width, height = check_value(name, size, tuple[Natural, Natural])
    multiple = spec.size_multiple
    if width % multiple or height % multiple or min(width, height) < multiple:
        raise UserError(
            f"{name} is {width}x{height}: expected multiples of {multiple}; the training size is "
            f"{spec.image_size}x{spec.image_size}."
        )
    return width, height


def sample_inputs(
    request: SampleRequest,
    spec: TextToImage,
    tokenizers: Mapping[str, TextTokenizer],
    sampler: ResolvedSampler,
    images: np.ndarray | None,
    shape: tuple[int, int, int],
) -> SampleInputs:
    """Return the program's arrays, on the host.

    Args:
      request: of the user.
      spec: of the model.
      tokenizers: its tokenizers.
      sampler: its settings, and the default of the guidance scale.
      images: to start from, checked.
      shape: of the latents.

    Raises:
      UserError: an argument that does not fit.
    """
    prompts = prompt_list(request.prompts)
    n = len(prompts)
    texts = [prompt.a if isinstance(prompt, Mix) else prompt for prompt in prompts]
    positive = tokenize(spec.conditioner, tokenizers, texts, composed=True)
    negative = tokenize(spec.conditioner, tokenizers, negative_list(request.negative_prompt, n))
    mix_text, mix_fraction = None, None
    if any(isinstance(prompt, Mix) for prompt in prompts):
        others = [prompt.b if isinstance(prompt, Mix) else "" for prompt in prompts]
        mix_text = tokenize(spec.conditioner, tokenizers, others).text
        fractions = [prompt.fraction if isinstance(prompt, Mix) else 0.0 for prompt in prompts]
        mix_fraction = np.asarray(fractions, np.float32)
    scale = sampler.guidance_scale if request.guidance_scale is None else request.guidance_scale
    scales, embedded = guidance_scales(
        float_array("guidance_scale", scale, n), spec, sampler.guidance
    )
    if scales.min() < 1 and sampler.guidance.true_cfg_scale is None:
        warnings.warn(
            f"guidance_scale is {scales.min():g}: below 1 it steers towards the negative prompt; 1 "
            "is unguided.",
            stacklevel=4,
        )
    seeds = range(n) if request.seeds is None else request.seeds
    mask = request.init_image.mask if request.init_image is not None else None
    return SampleInputs(
        text=positive.text,
        negative=negative.text,
        seeds=seed_array(one_each("seeds", seeds, n)),
        guidance_scale=scales,
        guidance=embedded,
        mix_text=mix_text,
        mix_fraction=mix_fraction,
        composed_text=positive.composed_text,
        composed_weights=positive.composed_weights,
        image=images,
        mask=None if mask is None or images is None else check_masks(mask, images.shape),
        noise=_noise(request.latents, n, shape),
    )


def guidance_scales(
    scales: Float32[np.ndarray, " n"], spec: TextToImage, guidance: Guidance
) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"] | None]:
    """Return the scales of eq. 1 of `sampling/guidance/cfg.py`, and those that the network reads.

    diffusers' pipelines of Stable Diffusion and XL are unguided at 1 and below, and cards of
    distilled models ask for 0. Other models follow eq. 1.

    Raises:
      UserError: a scale that has no effect on this model.
    """
    embeds, true_scale = spec.denoiser.guidance_embedding, guidance.true_cfg_scale
    if embeds or guidance.distilled:
        if not embeds and (scales != 1).any():
            raise UserError(
                f"guidance_scale is {scales[scales != 1][0]:g}, but {spec.name} is distilled to "
                "need no guidance: expected 1; leave it out, or set true_cfg_scale to guide all "
                "the same."
            )
        return np.full_like(scales, true_scale or 1), scales if embeds else None
    if true_scale is not None:
        raise UserError(
            f"true_cfg_scale is {true_scale:g}, but {spec.name} is not distilled: expected "
            "guidance_scale; give that instead."
        )
    if isinstance(spec.denoiser, UNet2DConditionConfig):
        return np.maximum(scales, np.float32(1)), None
    return scales, None


def _noise(latents: Any, n: int, shape: tuple[int, int, int]) -> np.ndarray | None:
    if latents is None:
        return None
    noise = np.asarray(latents, np.float32)
    if noise.shape != (n, *shape):
        raise UserError(
            f"latents are of shape {noise.shape}: expected {(n, *shape)} for {n} prompts."
        )
    if not np.isfinite(noise).all():
        raise UserError("latents have values that are not finite: expected noise of variance 1.")
    return noise


def size_of_ratio(ratio: str, area: int, multiple: int) -> tuple[int, int]:
    """Return the width and height nearest to an aspect ratio and an area.

    Args:
      ratio: WIDTH:HEIGHT, such as "16:9".
      area: in pixels.
      multiple: both sides are multiples of this.

    Raises:
      UserError: no such ratio, or one too far from square for so small an area.
    """
    try:
        width, height = (float(side) for side in ratio.split(":"))
        wanted = width / height
    except (ValueError, ZeroDivisionError):
        wanted = 0.0
    if not 0 < wanted < math.inf:
        raise UserError(f"The ratio is {ratio!r}: expected WIDTH:HEIGHT, such as 16:9.")
    if min(wanted, 1 / wanted) * area < multiple**2:
        raise UserError(
            f"The ratio {ratio} at about {area} pixels has a side below {multiple}, the model's "
            "least: expected one nearer to 1:1."
        )

    def nearest(side: float) -> int:
        below = max(1, int(side / multiple)) * multiple
        return min(below, below + multiple, key=lambda near: abs(math.log(near / side)))

    # Rounding each side minimises the errors of ratio and area: |a-b| + |a+b| = 2 max(|a|, |b|).
    return nearest(math.sqrt(area * wanted)), nearest(math.sqrt(area / wanted))


def slerp(
    a: Float32[np.ndarray, "*s"], b: Float32[np.ndarray, "*s"], fraction: float
) -> Float32[np.ndarray, "*s"]:
    """Interpolate between two noises along the arc (Shoemake 1985), which keeps their norm."""
    cosine = np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-4:  # equal noises
        return a
    weights = np.sin([(1 - fraction) * angle, fraction * angle]) / np.sin(angle)
    return (weights[0] * a + weights[1] * b).astype(np.float32)
