"""Edit images with a pipeline: invert, vary, interpolate, upscale, extend."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from jaxdiff.config.checked import check_value
from jaxdiff.config.fields import Count, Range, Seed
from jaxdiff.errors import UserError
from jaxdiff.pipelines.input_images import AnyImages, InitImage, Number, check_images
from jaxdiff.pipelines.inputs import (
    Integer,
    Mix,
    Prompt,
    one_each,
    prompt_list,
    slerp,
)
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.sampling.ddim_inversion import DDIMInverse
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solver import Solver
from jaxdiff.sampling.solvers_ode import DDIM

UPSCALE_STRENGTH = 0.35


def invert(
    pipe: Pipeline,
    images: AnyImages,
    prompts: Prompt | Sequence[Prompt] = "",
    *,
    rounds: int = 1,
    guidance_scale: Number | Sequence[Number] = 1.0,
    **arguments: Any,
) -> Float32[np.ndarray, "n i j c"]:
    """Invert images to noise by DDIM inversion (`sampling/ddim_inversion.py`).

    `pipe(prompts, latents=invert(pipe, images, prompts), sampler=Sampler(solver=DDIM()),
    guidance_scale=1)`, with the same num_steps, reconstructs the images up to the autoencoder.

    Args:
      pipe: to invert.
      images: uint8 [n, h, w, 3] or one image, or Pillow's.
      prompts: descriptions of the images, one for all or one each.
      rounds: evaluations per step; more invert a step of DDIM more exactly.
      guidance_scale: of the inversion; strong guidance is not invertible.
      arguments: others of `pipe`, such as num_steps.

    Returns:
      Noise of about unit variance, for `latents`.

    Raises:
      UserError: images of another shape or type, or as `pipe` raises.
    """
    checked, prompts = check_images(images), prompt_list(prompts)
    return pipe(
        prompts * len(checked) if len(prompts) == 1 else prompts,
        init=InitImage(image=checked, strength=1.0),  # all steps
        sampler=_with_solver(arguments.pop("sampler", None), DDIMInverse(rounds=rounds)),
        guidance_scale=guidance_scale,
        output="latents",
        **arguments,
    )


def variations(
    pipe: Pipeline,
    image: AnyImages,
    amount: Number | Sequence[Number] = 0.3,
    *,
    prompts: Prompt | Sequence[Prompt] = "",
    seeds: Integer | Iterable[Integer] = (0, 1, 2, 3),
    guidance_scale: Number | Sequence[Number] = 1.0,
    **arguments: Any,
) -> np.ndarray:
    """Sample variations of an image: its inverted noise, interpolated with the noise of seeds.

    Args:
      pipe: to sample with.
      image: uint8 [h, w, 3], or one each [n, h, w, 3].
      amount: fraction of the seed's noise, one for all or one each: 0 reconstructs the image, 1 is
        independent of it.
      prompts: descriptions of the image or its variations, one for all or one each.
      seeds: n of them.
      guidance_scale: of the variations; the inversion is unguided.
      arguments: others of `pipe`.

    Returns:
      Images [n, h, w, 3].

    Raises:
      UserError: as `invert` and `pipe` raise.
    """
    seeds = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    images, prompts, n = check_images(image), prompt_list(prompts), len(seeds)
    height, width = images.shape[1:3]
    own = invert(pipe, images, prompts, **_without(arguments, "output"))
    noises = pipe.noise(seeds, size=(width, height))
    # In float64, as Python's numbers would leave `slerp` in float32.
    amounts = np.asarray([check_value("amount", x, float) for x in one_each("amount", amount, n)])
    each = zip(np.broadcast_to(own, noises.shape), noises, amounts, strict=True)
    return pipe(
        prompts * n if len(prompts) == 1 else prompts,
        latents=np.stack([slerp(*one) for one in each]),
        seeds=seeds,
        sampler=_with_solver(arguments.pop("sampler", None), DDIM()),
        guidance_scale=guidance_scale,
        **arguments,
    )


def interpolate(
    pipe: Pipeline,
    prompts: tuple[str, str],
    frames: int,
    *,
    seeds: tuple[Integer, Integer] = (0, 0),
    images: AnyImages | None = None,
    **arguments: Any,
) -> np.ndarray:
    """Sample images between two prompts and two noises, both ends included.

    Args:
      pipe: to sample with.
      prompts: of the first and last image; equal prompts interpolate only the noise.
      frames: number of images, 2 or more.
      seeds: of the noise at both ends.
      images: uint8 [2, h, w, 3] to invert for the noise at both ends; the prompts describe them, or
        are "".
      arguments: others of `pipe`.

    Returns:
      Images [frames, h, w, 3].

    Raises:
      UserError: fewer than 2 frames, not two seeds, or as `pipe` raises.
    """
    frames = check_value("frames", frames, Annotated[int, Range(2)])
    seeds = check_value("seeds", seeds, tuple[Seed, Seed])
    if images is None:
        one, other = pipe.noise(seeds, size=arguments.get("size"))
    else:
        of_inversion = _without(arguments, "output", "guidance_scale")
        one, other = invert(pipe, check_images(images, 2), list(prompts), **of_inversion)
        sampler = arguments.pop("sampler", None) or Sampler()
        arguments["sampler"] = sampler.inherit(Sampler(solver=DDIM()))
        arguments = {"guidance_scale": 1.0} | arguments
    fractions = np.linspace(0, 1, frames)
    return pipe(
        [Mix(a=prompts[0], b=prompts[1], fraction=float(fraction)) for fraction in fractions],
        seeds=seeds[0],
        latents=np.stack([slerp(one, other, fraction) for fraction in fractions]),
        **arguments,
    )


def upscale(
    pipe: Pipeline,
    images: AnyImages,
    prompts: Prompt | Sequence[Prompt],
    *,
    factor: int = 2,
    strength: Number | Sequence[Number] = UPSCALE_STRENGTH,
    overlap: float = 0.5,
    **arguments: Any,
) -> np.ndarray:
    """Enlarge images, and sample details in windows of the training size.

    Args:
      pipe: to sample with.
      images: uint8 [n, h, w, 3], or one image for all prompts.
      prompts: descriptions of the images, n of them.
      factor: of their sides.
      strength: amount of noise, from 0 to 1, one for all or one each: more noise adds detail, but
        also new objects in each window.
      overlap: of the windows, as a fraction of their sides.
      arguments: others of `pipe`; vae_mode is "tiling" by default, or "slicing" if images wrap.

    Returns:
      Images [n, factor * h, factor * w, 3].

    Raises:
      UserError: factor is less than 1, or as `pipe` raises.
    """
    factor = check_value("factor", factor, Count)
    prompts = prompt_list(prompts)
    enlarged = enlarge(check_images(images, len(prompts)), factor)
    sampler = arguments.pop("sampler", None) or Sampler()
    wraps = any(sampler.inherit(pipe.spec.sampler).wrap or ())
    defaults = Sampler(overlap=overlap, vae_mode="slicing" if wraps else "tiling")
    return pipe(
        prompts,
        init=InitImage(image=enlarged, strength=strength),
        sampler=sampler.inherit(defaults),
        **arguments,
    )


def enlarge(images: UInt8[np.ndarray, "n h w 3"], factor: int) -> UInt8[np.ndarray, "n H W 3"]:
    """Resize images to `factor` times their sides by Lanczos' filter."""
    height, width = images.shape[1:3]
    size = width * factor, height * factor
    resized = [Image.fromarray(image).resize(size, Image.Resampling.LANCZOS) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def extend(
    image: AnyImages,
    *,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
) -> InitImage:
    """Place an image on a larger canvas, with a mask of the new region (outpainting).

    The edges of the image fill the canvas. Negative numbers crop: `left=-16, right=16` pans to the
    right.

    Args:
      image: uint8 [h, w, 3].
      left: columns to add or crop.
      top: rows.
      right: columns.
      bottom: rows.

    Returns:
      An `InitImage` for `pipe(prompts, init=extend(image, right=16))`.

    Raises:
      UserError: the crop is empty, a number is no integer, or an image of another shape or type.
    """
    (pixels,) = check_images(image, 1)
    height, width = pixels.shape[:2]
    added = {"left": left, "top": top, "right": right, "bottom": bottom}
    left, top, right, bottom = (check_value(name, x, int) for name, x in added.items())
    below, beside = max(height + min(bottom, 0), 0), max(width + min(right, 0), 0)
    cut = pixels[max(-top, 0) : below, max(-left, 0) : beside]
    if cut.size == 0:
        raise UserError(
            f"left={left}, top={top}, right={right}, bottom={bottom} crop all of an image of "
            f"{width}x{height}: expected to keep a part of it."
        )
    more = ((max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0)))
    mask = np.pad(np.zeros(cut.shape[:2], np.float32), more, constant_values=1)
    return InitImage(image=np.pad(cut, (*more, (0, 0)), mode="edge"), mask=mask)


def _without(arguments: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


def _with_solver(sampler: Sampler | None, solver: Solver) -> Sampler:
    return Sampler(solver=solver).inherit(sampler or Sampler())
