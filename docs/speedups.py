"""Options that trade images for speed or memory: time, and distance to the exact images.

    python docs/speedups.py --images 16
    python docs/speedups.py --model sd15 --images 1 --steps 8 --size 64 --width 0.2

`sd15` has the shapes of Stable Diffusion 1.5 and random weights: its images show nothing, and their
distances are those of numbers. All options run in turns, and their time is that of all cores, which
other load on the machine does not change. `--out` saves the images.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from etils import epath
from flax import nnx

from jaxdiff.benchmark.synthetic import random_bundle
from jaxdiff.benchmark.timing import time_in_turns
from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Positive, Range
from jaxdiff.config.recipe_files import find_recipe
from jaxdiff.datasets.produce.source import Produce, full_caption
from jaxdiff.io import images as pictures
from jaxdiff.io.terminal import write_line
from jaxdiff.models.convolutions import Conv
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import Dense, abstract_module, abstract_params
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.auxiliary_models import clip_scores
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.rerank import DEFAULT_CLIP
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.sampling.feature_cache import AnyCache, FirstBlockCache, TaylorSeer
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.training.recipe import load_recipe

EXACT = "exact"


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedupOptions:
    """Time a model's options, and compare their images with the exact ones."""

    model: str = "shipped:produce"
    """A model, or sd15 for the shapes of Stable Diffusion 1.5 with random weights."""
    images: Count = 16
    """Number of images."""
    steps: Annotated[int, Range(4)] = 24
    """Number of steps."""
    size: Count | None = None
    """Side of the images; that of the training images by default."""
    width: Positive = 1.0
    """Factor on the widths of the U-Net of sd15."""
    threshold: Positive = 0.2
    """Of the first-block cache."""
    repeats: Count = 5
    """Timed turns of each option."""
    only: tuple[str, ...] = ()
    """Beginnings of the names of options to time, such as quantize; all by default."""
    out: str | None = None
    """Folder for a grid of images of each option."""


def random_sd15(width: float, abstract: bool = False) -> Bundle:
    """Return Stable Diffusion 1.5 with random weights, and its U-Net's widths times a factor."""
    config = load_recipe(find_recipe("sd15"))
    model: Any = config.task.model  # type: ignore[union-attr]
    unet: UNet2DConditionConfig = model.denoiser
    widths = tuple(int(width * channels) for channels in unet.block_out_channels)
    spec: TextToImage = dataclasses.replace(
        model, denoiser=dataclasses.replace(unet, block_out_channels=widths)
    )
    if abstract:
        return Bundle(spec, spec.abstract_params(), {})
    task: Any = dataclasses.replace(config.task, model=spec)  # type: ignore[type-var]
    return random_bundle(dataclasses.replace(config, task=task))


def weights_fraction(spec: TextToImage) -> float:
    """Return the bytes of a model with kernels in 8 bits, over those in bfloat16."""
    total = eighth = 0
    for part in spec.parts:
        sizes = [x.size for x in jax.tree.leaves(abstract_params(part.build))]
        total += 2 * sum(sizes)
        eighth += 2 * sum(sizes)
        for _, layer in nnx.iter_modules(abstract_module(part.build)):
            if isinstance(layer, Dense | Conv):
                kernel, axes = layer.kernel, 4 if isinstance(layer, Conv) else 2
                scales = int(np.prod(kernel.shape[:-axes])) * kernel.shape[-1]
                eighth += 4 * scales - kernel.size
    return eighth / total


Contender = tuple[str, Callable[[], None]]


def contenders(
    options: SpeedupOptions,
    exact: Pipeline,
    small: Mapping[str, Pipeline],
    prompts: list[str],
    made: dict[str, np.ndarray],
) -> dict[str, Callable[[], None]]:
    """Return a call for each option, which puts its latents into `made` and decodes them."""
    side, steps = options.size or exact.image_size, options.steps

    def one(name: str, pipe: Pipeline, num_steps: int = steps, **settings: Any) -> Contender:
        def run() -> None:
            settings.update(num_steps=num_steps, size=(side, side), output="latents")
            made[name] = pipe(prompts, **settings)
            pipe.decode(made[name])

        return name, run

    caches: dict[str, AnyCache] = {
        f"--cache-interval {n}": TaylorSeer(interval=n) for n in (2, 3, 4)
    }
    threshold = options.threshold
    caches[f"--cache-threshold {threshold:g}"] = FirstBlockCache(threshold=threshold)
    guidance = Guidance(interval=(0.5, 1))
    every = dict(
        [
            one(EXACT, exact),
            *(one(f"{n} steps", exact, n) for n in (2 * steps // 3, steps // 2)),
            *(one(name, exact, sampler=Sampler(cache=cache)) for name, cache in caches.items()),
            one("--guidance-interval 0.5-1", exact, guidance=guidance),
            *(one(f"--quantize {kind}", pipe) for kind, pipe in small.items()),
        ]
    )
    wanted = (EXACT, *options.only) if options.only else ("",)
    return {name: run for name, run in every.items() if name.lstrip("-").startswith(wanted)}


def main(options: SpeedupOptions) -> None:
    """Print a table in Markdown."""
    is_random = options.model == "sd15"
    bundle = random_sd15(options.width) if is_random else load_bundle(options.model)
    exact = Pipeline(bundle, devices=jax.local_devices()[:1])
    small = {
        kind: Pipeline(bundle, quantize=kind, devices=exact.devices)
        for kind in ("int8", "fp8")
        if f"quantize {kind}".startswith(options.only or "")  # each has its own weights
    }
    source = Produce(size=64, length=options.images)
    prompts = [full_caption(source.scene(i)) for i in range(options.images)]
    made: dict[str, np.ndarray] = {}
    calls = contenders(options, exact, small, prompts, made)
    seconds = time_in_turns(calls, warmup=1, repeats=options.repeats, clock=time.process_time)
    write_line(
        "| option | CPU time | of exact | latents, relative L2 | mean difference of 255 "
        "| PSNR, dB | CLIP score |"
    )
    write_line("|---|---|---|---|---|---|---|")
    images = {name: exact.decode(latents) for name, latents in made.items()}
    for name, times in seconds.items():
        ratio = median(a / b for a, b in zip(times, seconds[EXACT], strict=True))
        apart = np.linalg.norm(made[name] - made[EXACT]) / np.linalg.norm(made[EXACT])
        difference = np.abs(images[name].astype(float) - images[EXACT])
        error = (difference**2).mean()
        psnr = f"{10 * np.log10(255**2 / error):.1f}" if error else ""
        score = (
            "" if is_random else f"{clip_scores(DEFAULT_CLIP, images[name], prompts).mean():.3f}"
        )
        write_line(
            f"| {name} | {median(times):.2f} s | {ratio:.2f} | {apart:.4f} | "
            f"{difference.mean():.2f} | {psnr} | {score} |"
        )
        if options.out is not None:
            file = f"{name.strip('-').replace(' ', '-')}.png"
            pictures.save_png(epath.Path(options.out) / file, pictures.grid(images[name][:16]))
    spec = random_sd15(1.0, abstract=True).spec if is_random else exact.spec
    write_line(f"{spec.name}, kernels in 8 bits: {weights_fraction(spec):.3f} of bfloat16")


if __name__ == "__main__":
    main(tyro.cli(SpeedupOptions))
