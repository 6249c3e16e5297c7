"""Ways to evaluate the unconditional model less often: evaluations saved, and distance to exact.

    python docs/guidance_skipping.py

`Adaptive` and `Every` are guidance rules: they ignore the unconditional estimates that an
implementation of its own would not evaluate, and count the others.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxdiff
from jaxdiff import Guidance
from jaxdiff.datasets.produce.source import Produce, full_caption
from jaxdiff.pipelines.flops import evaluation_times
from jaxdiff.sampling.guidance.guidance import Estimates

EVALUATED: list[int] = []  # how many images need an unconditional evaluation, for each step


def count(needed: jax.Array) -> None:
    """Count the images [b] that need an unconditional evaluation in a step."""
    jax.debug.callback(lambda needed: EVALUATED.append(int(needed.sum())), needed)


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Stop guidance of an image once the cosine similarity of both estimates is above a threshold.

    Adaptive guidance (Castillo et al. 2023, arXiv 2312.12487).
    """

    threshold: float

    def init_state(self, x: jax.Array) -> jax.Array:
        """Return, for each image, whether guidance has stopped."""
        return jnp.zeros(len(x), bool)

    def combine(
        self, estimates: Estimates, guidance_scale: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Guide the images whose guidance has not stopped."""
        cond, uncond = estimates.cond, estimates.uncond
        count(~state)
        scale = jnp.where(state, 1, guidance_scale).reshape(-1, 1, 1, 1)
        norms = jnp.sum(cond**2, (1, 2, 3)) * jnp.sum(uncond**2, (1, 2, 3))
        similarity = jnp.sum(cond * uncond, (1, 2, 3)) / jnp.sqrt(norms)
        return cond + (scale - 1) * (cond - uncond), state | (similarity > self.threshold)


class Differences(NamedTuple):
    """Step number, the last difference of both estimates, its slope in time, and its time."""

    step: jax.Array
    last: jax.Array
    slope: jax.Array
    t: jax.Array


@dataclasses.dataclass(frozen=True)
class Every:
    """Evaluate both models at every so many steps, and extrapolate their difference in between.

    As FasterCache does (Lv et al. 2024, arXiv 2410.19355), with one order of a Taylor series.
    """

    interval: int

    def init_state(self, x: jax.Array) -> Differences:
        """Return no difference."""
        return Differences(jnp.int32(0), jnp.zeros_like(x), jnp.zeros_like(x), jnp.float32(1))

    def combine(
        self, estimates: Estimates, guidance_scale: jax.Array, state: Differences
    ) -> tuple[jax.Array, Differences]:
        """Guide by this step's difference, or by one extrapolated from earlier steps."""
        step, last, slope, before = state
        cond, t, due = estimates.cond, estimates.t, step % self.interval == 0
        count(jnp.full(len(cond), due))
        difference = cond - estimates.uncond
        rise = (difference - last) / jnp.where(t == before, 1, t - before)
        used = jnp.where(due, difference, last + slope * (t - before))
        state = Differences(
            step + 1,
            jnp.where(due, difference, last),
            jnp.where(due & (step > 0), rise, slope),
            jnp.where(due, t, before),
        )
        return cond + (guidance_scale - 1).reshape(-1, 1, 1, 1) * used, state


def main(images: int = 64, steps: int = 24) -> None:
    """Print a table in Markdown.

    Args:
      images: number of images.
      steps: of the exact images.
    """
    pipe, source = jaxdiff.load("shipped:produce"), Produce(size=64, length=images)
    prompts = [full_caption(source.scene(i)) for i in range(images)]
    times = evaluation_times(pipe.spec.sampler.resolve(), pipe.spec.schedule, num_steps=steps)
    exact = pipe(prompts, num_steps=steps).astype(float)
    print("| option | evaluations of exact | mean difference of 255 | PSNR, dB |")
    print("|---|---|---|---|")

    def line(name: str, evaluations: float, made: np.ndarray) -> None:
        difference = np.abs(made - exact)
        psnr = 10 * np.log10(255**2 / (difference**2).mean())
        print(f"| {name} | {evaluations:.2f} | {difference.mean():.2f} | {psnr:.1f} |")

    for fraction in (5 / 6, 3 / 4, 2 / 3):
        fewer = round(fraction * steps)
        line(f"{fewer} steps", fewer / steps, pipe(prompts, num_steps=fewer))
    for low in (0.35, 0.5, 0.7):
        made = pipe(prompts, num_steps=steps, guidance=Guidance(interval=(low, 1)))
        line(f"interval {low:g}-1", sum(1 + (t >= low) for t in times) / 2 / steps, made)
    for rule in (*map(Adaptive, (0.998, 0.99, 0.95)), *map(Every, (2, 3))):
        EVALUATED.clear()
        made = pipe(prompts, num_steps=steps, guidance=Guidance(rule=rule))
        jax.effects_barrier()
        batch = pipe.batch_size(64, 64)
        padded = -(-images // batch) * batch
        line(str(rule), (1 + sum(EVALUATED) / padded / steps) / 2, made)


if __name__ == "__main__":
    tyro.cli(main)
