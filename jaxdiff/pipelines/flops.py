"""Model FLOPs of sampling: the solver's evaluations with guidance, the prompts, and decoding."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.distributed.chips import find_chip
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.inputs import first_step, guidance_scales
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.resolve import ResolvedSettings
from jaxdiff.pipelines.settings import Varies
from jaxdiff.sampling.loop import InitLatents, sample
from jaxdiff.sampling.sampler import ResolvedSampler
from jaxdiff.sampling.solver import State, StatefulDenoiser

_NOT_COUNTED = (
    "best_of",
    "upscale",
    "variation",
    "clip_scale",
    "guide_scale",
    "reference",
    "refiner_start",
)
"""Settings by which further models or images take part."""


def sampling_flops(
    model: TextToImage,
    sampler: ResolvedSampler,
    size: tuple[int, int],
    *,
    num_steps: int,
    first: int = 0,
) -> float:
    """Return the FLOPs of generating one image.

    At times in the guidance interval an evaluation takes the network twice, for the prompt and for
    the negative prompt, unless the model is distilled or the guidance scale is 1. Composed prompts
    and auxiliary models do not count. Evaluations that a cache of features saves do.

    Args:
      model: the specification.
      sampler: its solver, time grid, guidance, guidance scale and `resample_steps` count.
      size: width and height in pixels.
      num_steps: of the time grid.
      first: the first step taken, above 0 where an image is the start.
    """
    rows, columns, _ = model.latent_shape(size[1], size[0])
    length = model.conditioner.text_length
    network = model.denoiser.flops(height=rows, width=columns, text_length=length)
    times = evaluation_times(
        sampler,
        model.schedule,
        num_steps=num_steps,
        num_tokens=model.denoiser.num_tokens(height=rows, width=columns),
        first=first,
    )
    scale = np.array([sampler.guidance_scale], np.float32)
    scales, _ = guidance_scales(scale, model, sampler.guidance)
    guidance = sampler.guidance.at_scales(scales)
    low, high = guidance.active_interval
    guided = guidance.is_classifier_free(model.denoiser.guidance_embedding)
    calls = sum(1 + (guided and low <= t <= high) for t in times[sampler.guidance.zero_steps :])
    total = calls * network + (1 + guided) * model.conditioner.flops()
    if model.autoencoder is not None:
        total += model.autoencoder.decode_flops(height=size[1], width=size[0])
    return total


@functools.lru_cache(maxsize=4096)
def evaluation_times(
    sampler: ResolvedSampler,
    schedule: Schedule,
    *,
    num_steps: int,
    num_tokens: int = 1,
    first: int = 0,
) -> tuple[float, ...]:
    """Return the time of each evaluation of the denoiser, by sampling a single number."""
    run, times = _probe(sampler, schedule, num_tokens)
    times.clear()
    run(jnp.int32(num_steps), jnp.int32(first)).block_until_ready()
    jax.effects_barrier()
    return tuple(times)


@functools.lru_cache(maxsize=16)
def _probe(
    sampler: ResolvedSampler, schedule: Schedule, num_tokens: int
) -> tuple[Callable[[Array, Array], Array], list[float]]:
    """Return a compiled loop (num_steps, first) on a single number, and the times it appends."""
    times: list[float] = []

    def denoise(x: Array, t: Array, state: State) -> tuple[Array, State]:
        jax.debug.callback(lambda t: times.append(float(t)), t, ordered=True)
        return x, state

    def run(num_steps: Array, first_step: Array) -> Array:
        zero = jnp.zeros((1, 1, 1, 1))
        return sample(
            StatefulDenoiser(denoise=denoise),
            sampler.solver,
            schedule,
            sampler.grid,
            num_steps,
            zero,
            jnp.zeros(1, jnp.uint32),
            init=InitLatents(zero, first_step=first_step),
            resample_steps=sampler.resample_steps,
            num_tokens=num_tokens,
        ).images

    return jax.jit(run), times


class SamplingSpeed:
    """Images per second and model FLOP utilisation of calls that compile nothing.

    Args:
      pipe: whose devices count; on chips that the table of chips lacks, as on a CPU, there is no
        utilisation.
    """

    def __init__(self, pipe: Pipeline):
        chip = find_chip(pipe.devices[0].device_kind)
        self._pipe, self._peak = pipe, chip and chip.flops * len(pipe.devices)
        self._compiled: set[object] = set()
        self._images, self._flops, self._seconds = 0, 0.0, 0.0

    def add(self, settings: Sequence[ResolvedSettings], seconds: float) -> None:
        """Add a call; the first of each program compiles and does not count."""
        program = settings[0].group(Varies.PROGRAM)
        if program in self._compiled:
            self._images += len(settings)
            self._seconds += seconds
            self._flops += sum(map(self._flops_of, settings)) if self._peak else 0.0
        self._compiled.add(program)

    def _flops_of(self, one: ResolvedSettings) -> float:
        """Return the FLOPs of an image; NaN where further models or images take part."""
        asked = one.settings
        if any(getattr(asked, name) for name in _NOT_COUNTED):
            return math.nan
        assert asked.guidance_scale is not None
        sampler = one.sampler.inherit(self._pipe.spec.sampler).resolve()
        sampler = dataclasses.replace(sampler, guidance_scale=asked.guidance_scale)
        num_steps = asked.num_steps or sampler.num_steps
        first = 0 if asked.strength is None else first_step(asked.strength, num_steps)
        return sampling_flops(self._pipe.spec, sampler, one.size, num_steps=num_steps, first=first)

    def text(self) -> str:
        """Return the speed as the end of a sentence; "" if every call compiled."""
        if not self._images:
            return ""
        text = f"; {self._images / self._seconds:,.3g} images/s without compilation"
        mfu = self._peak and self._flops / self._seconds / self._peak
        return f"{text}, MFU {mfu:.1%}" if mfu and math.isfinite(mfu) else text
