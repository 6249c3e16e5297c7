"""Measure the overhead of a sampling step over the network's own call.

    python -m jaxdiff.benchmark.sampler_overhead --sizes 64 128 256

The time of a step is a pipeline's time for many steps minus that for few, divided by the difference
in steps, which cancels the text encoder and the decoder. The bare call is the network alone,
compiled by itself, on the same number of images: with classifier-free guidance conditional and
unconditional ones. The two are timed in turns, so that other load on the machine slows both, and
the fastest of each counts.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxdiff.benchmark.timing import time_in_turns
from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count
from jaxdiff.io.terminal import write_line
from jaxdiff.models.conditioning import AESTHETIC_SCORE, full_size_crop
from jaxdiff.pipelines.batching import default_batch_size
from jaxdiff.pipelines.inputs import SampleRequest
from jaxdiff.pipelines.load import load
from jaxdiff.pipelines.pipeline import Pipeline

_PROMPT = "a small green pea"


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class OverheadOptions:
    """Time a sampling step and a bare call of the network."""

    model: str = "shipped:produce"
    """A run, an exported model or shipped:NAME, as for `sample.py --model`."""
    sizes: tuple[Count, ...] = (64, 128, 256)
    """Sides of the images."""
    steps: tuple[Count, Count] = (4, 24)
    """Few and many steps, whose times are subtracted."""
    repeats: Count = 5
    """Timed turns of each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overhead:
    """Seconds of one step on `batch` images: of the bare network, and of the sampler."""

    size: int
    batch: int
    bare: float
    sampler: float

    @property
    def fraction(self) -> float:
        """Additional time of a sampling step, relative to the bare network."""
        return self.sampler / self.bare - 1


def sampler_overhead(
    pipeline: Pipeline, size: int, *, steps: tuple[int, int], repeats: int
) -> Overhead:
    """Time both at one size, on one device; `steps` are few and many."""
    batch = default_batch_size(size, size)
    few, many = steps
    call = bare_network(pipeline, size, batch)

    def bare() -> None:
        for _ in range(many - few - 1):
            call()
        jax.block_until_ready(call())

    def sampled(num_steps: int) -> Callable[[], object]:
        prompts = [_PROMPT] * batch
        return lambda: pipeline(prompts, size=(size, size), num_steps=num_steps)

    contenders = {"bare": bare, "few": sampled(few), "many": sampled(many)}
    # The first turn compiles.
    seconds = time_in_turns(contenders, warmup=1, repeats=repeats)
    fastest = {name: min(times) for name, times in seconds.items()}
    sampler = (fastest["many"] - fastest["few"]) / (many - few)
    return Overhead(size=size, batch=batch, bare=fastest["bare"] / (many - few), sampler=sampler)


def bare_network(pipeline: Pipeline, size: int, batch: int) -> Callable[[], jax.Array]:
    """Return a call of the network on what a sampling step evaluates it on.

    These are `batch` conditional images and, with classifier-free guidance, as many unconditional
    ones.
    """
    request = SampleRequest.of(prompts=[_PROMPT] * batch, size=(size, size), batch_size=batch)
    call, spec = pipeline.prepare(request), pipeline.spec
    embeds, scales = spec.denoiser.guidance_embedding, call.inputs.guidance
    rows = 1 + call.spec.sampler.guidance.is_classifier_free(embeds)
    n = rows * batch

    @jax.jit
    def encode_text(params, inputs):
        cond = spec.encode_text(params, inputs)
        return cond._replace(
            size_crop=full_size_crop(size, size, n),
            aesthetic_score=jnp.full(n, AESTHETIC_SCORE),
            guidance=None if scales is None else jnp.resize(scales, (n,)),
        )

    predict = jax.jit(spec.predict)
    x = jnp.asarray(
        np.random.default_rng(0).normal(size=(n, *spec.latent_shape(size, size))), jnp.float32
    )
    prompts = [_PROMPT, None][:rows] * batch
    cond = encode_text(pipeline.params, spec.conditioner.tokenize(pipeline.tokenizers, prompts))
    return lambda: predict(pipeline.params, x, jnp.full(n, 0.5), cond)


def print_overheads(options: OverheadOptions) -> None:
    """Print a line for each size."""
    pipeline = load(options.model, devices=jax.local_devices()[:1])
    write_line(f"{pipeline.spec.name} on {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    for size in options.sizes:
        found = sampler_overhead(pipeline, size, steps=options.steps, repeats=options.repeats)
        write_line(
            f"{size}x{size}, batch {found.batch}: network {1e3 * found.bare:.2f} ms, sampling step "
            f"{1e3 * found.sampler:.2f} ms: {found.fraction:+.1%}"
        )


if __name__ == "__main__":
    print_overheads(tyro.cli(OverheadOptions))
