"""Sampling with Stable Diffusion's networks in jaxdiff and diffusers, timed in turns.

Both have the same random weights, initial noise, prompts, solver and guidance. A call encodes the
prompts, takes all steps and decodes the images. diffusers' U-Net runs eagerly, and again under
torch.compile.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from benchmarks.torch_baseline import TorchMemory, jax_peak, torch_device, utilisation
from jaxdiff.benchmark import synthetic
from jaxdiff.benchmark.report import Measurement
from jaxdiff.benchmark.timing import time_in_turns
from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.flops import sampling_flops
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.diffusers_folder import write_diffusers
from jaxdiff.training.recipe import Config

PROMPT = "a small green pea"
TOLERANCE = 2.0  # mean difference of images in float32, of 255; more is an error

Images = Callable[[], np.ndarray]


class Contender(NamedTuple):
    """A timed sampler, with the images, the time and the peak memory of its first call.

    `peak_bytes` is the memory of a GPU, None on a CPU.
    """

    run: Images
    images: np.ndarray
    first_call_s: float
    peak_bytes: int | None


def measure(config: Config, *, warmup: int, repeats: int) -> list[Measurement]:
    """Time a batch of `train.batch_size` images of the recipe's model in turns.

    Raises:
      UserError: the model is not one of Stable Diffusion 1 or 2, or the images differ.
    """
    bundle, count = synthetic.random_bundle(config), config.train.batch_size
    model, size = bundle.spec, config.data.transforms.size
    shape = (count, *model.latent_shape(size, size))
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    pipeline = Pipeline(bundle, devices=jax.local_devices()[:1], dtype=config.train.compute)

    def ours() -> np.ndarray:
        return pipeline([PROMPT] * count, latents=noise, batch_size=count, output="float")

    contenders = {"jaxdiff": _first(ours, jax_peak)}
    for name, compiled in (("diffusers, eager", False), ("diffusers, compiled", True)):
        memory = TorchMemory()
        theirs = _diffusers(config, bundle, noise, compiled=compiled)
        contenders[name] = _first(theirs, memory.peak)
    expected = contenders["jaxdiff"].images
    far = {
        name: 255 * float(np.abs(one.images - expected).mean()) for name, one in contenders.items()
    }
    if config.train.compute == "float32" and max(far.values()) > TOLERANCE:
        raise UserError(
            f"The images differ from jaxdiff's by {far} of 255: expected equal images; the times "
            "are not comparable."
        )
    runs = {name: one.run for name, one in contenders.items()}
    seconds = time_in_turns(runs, warmup=warmup, repeats=repeats)
    sampler = model.sampler.resolve()
    flops = count * sampling_flops(model, sampler, (size, size), num_steps=sampler.num_steps)
    return [
        Measurement(
            name=name,
            unit="batch",
            seconds=seconds[name],
            images=count,
            metrics={
                "num_steps": float(sampler.num_steps),
                "first_call_s": one.first_call_s,
                "difference_of_255": far[name],
                **utilisation(flops, seconds[name], one.peak_bytes),
            },
            notes=["Text encoder, all steps with guidance, and decoder."],
        )
        for name, one in contenders.items()
    ]


def _first(run: Images, peak: Callable[[], int | None]) -> Contender:
    start = time.perf_counter()
    images = run()
    return Contender(run, images, time.perf_counter() - start, peak())


def _diffusers(config: Config, bundle: Any, noise: np.ndarray, *, compiled: bool) -> Images:
    """Return a call of diffusers' pipeline with the bundle's weights."""
    model: TextToImage = bundle.spec
    network = model.denoiser
    if not isinstance(network, UNet2DConditionConfig) or network.added_width is not None:
        raise UserError(
            f"{config.name} cannot be timed against diffusers: expected a recipe of Stable "
            "Diffusion 1 or 2."
        )
    device, kind = torch_device(), getattr(torch, config.train.compute)
    with tempfile.TemporaryDirectory() as folder:
        write_diffusers(folder, bundle)
        pipe: Any = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=kind)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if device == "cuda":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if compiled:
        pipe.unet = torch.compile(pipe.unet)
    sampler = model.sampler.resolve()
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()).to(device, kind)

    def run() -> np.ndarray:
        return pipe(
            [PROMPT] * len(noise),
            latents=latents,
            num_inference_steps=sampler.num_steps,
            guidance_scale=sampler.guidance_scale,
            output_type="np",
        ).images

    return run
