"""Time sampling: a batch of images, and a sampling step compared with the network alone."""

import functools
import time
from statistics import median

import jax

from jaxdiff.benchmark import synthetic
from jaxdiff.benchmark.report import Measurement
from jaxdiff.benchmark.sampler_overhead import bare_network
from jaxdiff.benchmark.timing import peak_memory, time_in_turns
from jaxdiff.benchmark.train import TERA, peak_of_device
from jaxdiff.errors import UserError
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.batching import default_batch_size
from jaxdiff.pipelines.flops import sampling_flops
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.training.profiler import traced
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.diffusion import DiffusionTask


def time_sampling(
    config: Config,
    *,
    warmup: int,
    repeats: int,
    batch_size: int | None,
    peak_tflops: float | None = None,
    trace: str | None = None,
) -> Measurement:
    """Time one batch with the recipe's solver, steps and guidance, and random weights.

    The time of a step is the difference between sampling with all steps and with half of them,
    divided by the number of steps between. One evaluation of the guided network is timed in turns
    with both. For a solver that evaluates the network once per step, their ratio is the overhead
    of the sampling loop.

    Args:
      config: the recipe.
      warmup: batches before those that count.
      repeats: batches that count.
      batch_size: images in a batch; None chooses for the device.
      peak_tflops: peak TFLOP/s of the device; by default from its data sheet.
      trace: folder of a trace of one more batch.

    Raises:
      UserError: the recipe generates no images from prompts, or has fewer than 2 steps.
    """
    model = _model_of(config)
    sampler = model.sampler.resolve()
    steps = sampler.num_steps
    size = model.image_size
    count = batch_size or default_batch_size(size, size)
    pipeline = Pipeline(synthetic.random_bundle(config), devices=jax.local_devices()[:1])
    prompts = ["a small green pea"] * count
    half = steps // 2
    generate = functools.partial(pipeline, prompts, batch_size=count)
    start = time.perf_counter()
    generate(num_steps=half)
    first = time.perf_counter() - start
    network = bare_network(pipeline, size, count)
    jax.block_until_ready(network())
    seconds = time_in_turns(
        {
            "all": generate,
            "half": lambda: generate(num_steps=half),
            "network": lambda: jax.block_until_ready(network()),
        },
        warmup=warmup,
        repeats=repeats,
    )
    memory = peak_memory()
    if trace is not None:
        with traced(trace):
            generate()
    flops = sampling_flops(model, sampler, (size, size), num_steps=steps) / TERA
    peak, note = peak_of_device(peak_tflops)
    step = (median(seconds["all"]) - median(seconds["half"])) / (steps - half)
    alone = median(seconds["network"])
    metrics = {
        "compile_s": first - median(seconds["half"]),
        "num_steps": float(steps),
        "step_s": step,
        "network_alone_s": alone,
        "step_over_network": step / alone,
        "peak_memory_bytes": memory.bytes,
        "model_tflops_per_image": flops,
        "model_tflops_per_s": flops * count / median(seconds["all"]),
    }
    if peak is not None:
        metrics["mfu"] = metrics["model_tflops_per_s"] / peak
    return Measurement(
        name="jaxdiff",
        unit="batch",
        seconds=seconds["all"],
        images=count,
        metrics=metrics,
        notes=[f"Peak memory is that of {memory.of}.", note],
    )


def _model_of(config: Config) -> TextToImage:
    """Return the model of a recipe that generates images in at least two steps."""
    task = config.task
    if not isinstance(task, DiffusionTask) or task.model.is_inpainting:
        raise UserError(
            f"{config.name} generates no images from prompts: give bench sample a diffusion recipe."
        )
    steps = task.model.sampler.resolve().num_steps
    if steps < 2:
        raise UserError(f"task.model.sampler.num_steps is {steps}: expected at least 2.")
    return task.model
