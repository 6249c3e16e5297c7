"""Times drawing: a whole batch of images, and what a step costs beside its network alone."""

import functools
import time

import jax

from jaxdiff.benchmark import synthetic
from jaxdiff.benchmark.report import Measured
from jaxdiff.benchmark.sampler_overhead import bare_network
from jaxdiff.benchmark.timing import in_turn, median, peak_memory
from jaxdiff.errors import UserError
from jaxdiff.pipelines.batching import default_batch_size
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.diffusion import DiffusionTask


def measure(config: Config, *, warmup: int, repeats: int, batch_size: int | None) -> Measured:
    """Seconds to draw one batch by the recipe's solver, steps and guidance, weights at random.

    A step of the loop is the difference of drawing with all steps and with half of them, over the
    number of steps that they differ by; beside it, and in turn with it, stands the guided network
    evaluated once by itself. With a solver that evaluates it once a step their ratio is the loop's
    overhead.

    Raises:
      UserError: the recipe draws nothing, or has too few steps to time one.
    """
    task = config.task
    if not isinstance(task, DiffusionTask) or task.model.is_inpainting:
        raise UserError(
            f"{config.name} draws no images from prompts: give bench sample a recipe of diffusion."
        )
    steps = task.model.sampler.resolve().num_steps
    if steps < 2:
        raise UserError(f"sampler.num_steps is {steps}: bench sample needs at least 2.")
    size = config.data.transforms.size
    count = batch_size or default_batch_size(size, size)
    pipeline = Pipeline(synthetic.bundle(config), devices=jax.local_devices()[:1])
    prompts = ["a small green pea"] * count
    half = steps // 2
    draw = functools.partial(pipeline, prompts, batch_size=count)
    start = time.perf_counter()
    draw(num_steps=half)
    first = time.perf_counter() - start
    network = bare_network(pipeline, size, count)
    jax.block_until_ready(network())
    seconds = in_turn(
        {
            "all": draw,
            "half": lambda: draw(num_steps=half),
            "network": lambda: jax.block_until_ready(network()),
        },
        warmup=warmup,
        repeats=repeats,
    )
    memory = peak_memory()
    step = (median(seconds["all"]) - median(seconds["half"])) / (steps - half)
    alone = median(seconds["network"])
    figures = {
        "compile_s": first - median(seconds["half"]),
        "num_steps": float(steps),
        "step_s": step,
        "network_alone_s": alone,
        "step_over_network": step / alone,
        "peak_memory_bytes": memory.bytes,
    }
    return Measured(
        name="jaxdiff",
        what="batch",
        seconds=seconds["all"],
        images=count,
        figures=figures,
        notes=[f"Peak memory is that of {memory.of}."],
    )
