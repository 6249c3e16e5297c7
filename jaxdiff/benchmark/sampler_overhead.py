"""What a step of the sampler costs beyond the network's own call.

    python -m jaxdiff.benchmark.sampler_overhead --sizes 64 128 256

A step is a pipeline's time for many steps less its time for few, over the difference: what is done
once, from the text encoder to the decoder, falls out. The bare call is the network alone, compiled
by itself, on as many images, prompted and unprompted, called from Python again and again. The two
take turns, so that whatever else the machine does slows both, and the fastest of each counts.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxdiff.benchmark.timing import in_turn
from jaxdiff.models.conditioning import full_size_crop
from jaxdiff.pipelines.batching import default_batch_size
from jaxdiff.pipelines.pipeline import DEFAULT_MODEL, Pipeline, load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    model: str = DEFAULT_MODEL
    """As for `sample.py --model`."""
    sizes: tuple[int, ...] = (64, 128, 256)
    """Sides of the images."""
    steps: tuple[int, int] = (4, 24)
    """Few, and many."""
    repeats: int = 5
    """Turns that each takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overhead:
    """Seconds of one step on `batch` images."""

    size: int
    batch: int
    bare: float
    sampler: float

    @property
    def share(self) -> float:
        """By how much a step of the sampler takes longer; 0 is as long."""
        return self.sampler / self.bare - 1


def measure(pipeline: Pipeline, size: int, *, steps: tuple[int, int], repeats: int) -> Overhead:
    """Times both at one size, on the pipeline's first device.

    Args:
      pipeline: on one device.
      size: side of the images.
      steps: few, and many.
      repeats: turns that each takes.
    """
    batch = default_batch_size(size, size)
    few, many = steps
    call = bare_network(pipeline, size, batch)

    def bare() -> None:
        for _ in range(many - few - 1):
            call()
        jax.block_until_ready(call())

    def sampled(num_steps: int) -> Callable[[], object]:
        prompts = ["a small green pea"] * batch
        return lambda: pipeline(prompts, size=(size, size), num_steps=num_steps)

    contenders = {"bare": bare, "few": sampled(few), "many": sampled(many)}
    # The first turn compiles.
    seconds = in_turn(contenders, warmup=1, repeats=repeats)
    fastest = {name: min(times) for name, times in seconds.items()}
    sampler = (fastest["many"] - fastest["few"]) / (many - few)
    return Overhead(size=size, batch=batch, bare=fastest["bare"] / (many - few), sampler=sampler)


def bare_network(pipeline: Pipeline, size: int, batch: int) -> Callable[[], jax.Array]:
    """Return a call of the network alone, on a step's images with and without prompts."""
    spec, n = pipeline.spec, 2 * batch

    @jax.jit
    def encode(params, inputs):
        cond = spec.encode_text(params, inputs)
        return cond._replace(size_crop=full_size_crop(size, size, n))

    predict = jax.jit(spec.predict)
    shape = (n, *spec.latent_shape(size, size))
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    prompts = ["a small green pea", None] * batch
    cond = encode(pipeline.params, spec.conditioner.tokenize(pipeline.tokenizers, prompts))
    return lambda: predict(pipeline.params, x, jnp.full(n, 0.5), cond)


def main(options: Options) -> None:
    """Prints a line for each size."""
    pipeline = load(options.model, devices=jax.local_devices()[:1])
    print(f"{pipeline.spec.name} on {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    for size in options.sizes:
        found = measure(pipeline, size, steps=options.steps, repeats=options.repeats)
        print(
            f"{size}x{size}, {found.batch} at a time: bare {1e3 * found.bare:.2f} ms, a step of "
            f"the sampler {1e3 * found.sampler:.2f} ms: {found.share:+.1%}"
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
