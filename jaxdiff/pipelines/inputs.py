"""Check a user's arguments, and convert them to the program's arrays."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32, UInt8, UInt32
from PIL import Image

from jaxdiff.config.checked import check_value, checked
from jaxdiff.config.fields import Count, Natural, Seed, Text
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.errors import FieldError, UserError
from jaxdiff.io.image_decoding import ImageError
from jaxdiff.io.images import mask_of, picture_of
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.batching import Callback
from jaxdiff.pipelines.program import SampleInputs
from jaxdiff.pipelines.prompt_weights import tokenize
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.sampler import ResolvedSampler, Sampler, Steps

IMAGE_STRENGTH = 0.6

Integer = int | np.integer
Number = Integer | float | np.floating
Output = Literal["uint8", "float", "latents"]
AnyImages = np.ndarray | Image.Image | Sequence[Image.Image]


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
class InitImage:
    """Images to start from.

    Attributes:
      image: uint8 or float in [0, 1], [n, h, w, 3] or one for all, or Pillow's; its size is the
        result's.
      mask: 1 where the image is replaced and 0 where pixels are kept, [n, h, w] or one for all, or
        Pillow's; None replaces all.
      strength: amount of noise added to the image, from 0 to 1, one for all or one each; 0.6 by
        default, 1 with a mask.
    """

    image: AnyImages
    mask: AnyImages | None = None
    strength: Number | Iterable[Number] | None = None


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
    init: InitImage | None = None
    sampler: Sampler | None = None
    guidance: Guidance | None = None
    output: Output = "uint8"
    batch_size: Count | None = None
    callback: Callback | None = None

    def __post_init__(self):
        # Once, as an iterator can be read.
        object.__setattr__(self, "prompts", prompt_list(self.prompts))

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
        raise UserError(f"{name} is {value!r}: expected a text, such as 'a small green pea'.")
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


def check_images(image: Any, n: int | None = None) -> UInt8[np.ndarray, "n h w 3"]:
    """Return one image for each of n prompts, by default as many as there are.

    A single image is repeated. Pillow's are read as `io/images.py` reads files.

    Raises:
      UserError: neither uint8 nor float in [0, 1], or not [h, w, 3], [1, h, w, 3] or [n, h, w, 3].
    """
    images = _array("image", image, picture_of)
    images = images[None] if images.ndim == 3 else images
    if images.ndim == 4 and images.dtype.kind == "f":
        if not (images.min(initial=0) >= 0 and images.max(initial=1) <= 1):
            raise UserError(
                f"image has values from {images.min():g} to {images.max():g}: expected uint8, or "
                "floats from 0 to 1."
            )
        images = np.rint(images * 255).astype(np.uint8)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise UserError(
            f"image is {images.dtype} {images.shape}: expected uint8 [n, height, width, 3]."
        )
    return _broadcast("image", images, len(images) if n is None else n)


def check_masks(mask: Any, shape: tuple[int, ...]) -> Float32[np.ndarray, "n h w"]:
    """Return one mask, from 0 to 1, for each of the images [n, h, w, 3].

    Pillow's images are masks as `io/images.py` reads files.

    Raises:
      UserError: another size, or values out of range.
    """
    masks = _array("mask", mask, mask_of)
    if masks.dtype.kind not in "biuf":
        raise UserError(f"mask is {masks.dtype}: expected numbers from 0 to 1.")
    masks = masks.astype(np.float32)
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim != 3 or masks.shape[1:] != shape[1:3]:
        raise UserError(f"mask is of shape {masks.shape}: expected that of the image, {shape[:3]}.")
    if not (masks.min(initial=0) >= 0 and masks.max(initial=0) <= 1):
        raise UserError(
            f"mask goes from {masks.min():g} to {masks.max():g}: expected 0 where the image is "
            "kept and 1 where it is replaced."
        )
    return _broadcast("mask", masks, shape[0])


def _array(name: str, value: Any, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """Return an array; `convert` reads Pillow's images.

    Raises:
      UserError: it is neither an array nor an image that can be read.
    """
    try:
        if isinstance(value, list | tuple):
            value = [convert(x) if isinstance(x, Image.Image) else x for x in value]
        array = np.asarray(convert(value) if isinstance(value, Image.Image) else value)
    except ImageError as error:
        raise UserError(
            f"{name} cannot be read ({error}): expected an image of 8 bits per channel."
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} is no array ({error}): expected images of one size.") from error
    if array.dtype.kind in "USO":
        raise UserError(
            f"{name} is a {type(value).__name__}: expected an array, or an image of Pillow such as "
            "PIL.Image.open(file)."
        )
    return array


def _broadcast(name: str, values: np.ndarray, n: int) -> np.ndarray:
    if len(values) not in (1, n):
        raise UserError(f"{name} has {len(values)} for {n} prompts: expected one, or one each.")
    return np.broadcast_to(values, (n, *values.shape[1:]))


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


def first_steps(init: InitImage | None, num_steps: Sequence[int]) -> list[int]:
    """Return the index of each image's first step.

    Raises:
      UserError: a strength outside [0, 1], or neither one nor one each.
    """
    n = len(num_steps)
    if init is None:
        return [0] * n
    default = IMAGE_STRENGTH if init.mask is None else 1.0
    strengths = one_each("strength", default if init.strength is None else init.strength, n)
    float_array("strength", strengths, n)  # raises for what is no number
    return [first_step(float(s), k) for s, k in zip(strengths, num_steps, strict=True)]


def image_size(
    request: SampleRequest, spec: TextToImage, images: np.ndarray | None
) -> tuple[int, int]:
    """Return width and height: as requested, or of images or latents, or the training size.

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
    return check_size(size or (spec.image_size, spec.image_size), spec)


def check_size(size: tuple[int, int], spec: TextToImage) -> tuple[int, int]:
    """Return width and height.

    Raises:
      UserError: they are no two multiples of the model's `size_multiple`.
    """
    width, height = check_value("size", size, tuple[Natural, Natural])
    multiple = spec.size_multiple
    if width % multiple or height % multiple or min(width, height) < multiple:
        raise UserError(
            f"size is {width}x{height}: expected multiples of {multiple}; the training size is "
            f"{spec.image_size}x{spec.image_size}."
        )
    return width, height


def sample_inputs(
    request: SampleRequest,
    spec: TextToImage,
    tokenizers: Mapping[str, TextTokenizer],
    guidance_scale: float,
    images: np.ndarray | None,
    shape: tuple[int, int, int],
) -> SampleInputs:
    """Return the program's arrays, on the host.

    Args:
      request: of the user.
      spec: of the model.
      tokenizers: its tokenizers.
      guidance_scale: default of the request's.
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
    scale = guidance_scale if request.guidance_scale is None else request.guidance_scale
    scales = float_array("guidance_scale", scale, n)
    seeds = range(n) if request.seeds is None else request.seeds
    mask = request.init.mask if request.init is not None else None
    return SampleInputs(
        text=positive.text,
        negative=negative.text,
        seeds=seed_array(one_each("seeds", seeds, n)),
        guidance_scale=_guidance_scales(scales, spec),
        mix_text=mix_text,
        mix_fraction=mix_fraction,
        composed_text=positive.composed_text,
        composed_weights=positive.composed_weights,
        image=images,
        mask=None if mask is None or images is None else check_masks(mask, images.shape),
        noise=_noise(request.latents, n, shape),
    )


def _guidance_scales(
    scales: Float32[np.ndarray, " n"], spec: TextToImage
) -> Float32[np.ndarray, " n"]:
    """Return the scales of eq. 1 of `sampling/guidance/cfg.py`.

    diffusers' pipelines of Stable Diffusion and XL are unguided at 1 and below, and cards of
    distilled models ask for 0. Other models follow eq. 1, with a warning below 1.
    """
    if isinstance(spec.denoiser, UNet2DConditionConfig):
        return np.maximum(scales, np.float32(1))
    if scales.min() < 1:
        warnings.warn(
            f"guidance_scale is {scales.min():g}: below 1 it steers towards the negative prompt; 1 "
            "is unguided.",
            stacklevel=4,
        )
    return scales


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
