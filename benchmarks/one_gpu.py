"""All comparisons with PyTorch for one GPU of 80 GB or more, in one run of about 15 minutes.

    pip install torch==2.13.0 && pip install -e '.[parity,gpu]'
    python -m benchmarks.one_gpu
    python -m benchmarks.one_gpu --tiny  # small networks, to try the script on a CPU

Training of DiT-XL/2 at 256 pixels on cached latents, training of Stable Diffusion 1.5's U-Net at
512 and sampling with it, in bfloat16, beside PyTorch eager and under torch.compile: times in turns,
MFU, and peak memory. Each runs in a process of its own, and writes its report to `--out` at its
end, so that a failure leaves the others.
"""

import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks import torch_baseline, torch_sampling
from jaxdiff.cli.bench import TimingOptions, measure_and_report
from jaxdiff.config.recipe_files import find_recipe
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import ClipTextEncoder
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.training.recipe import Config, load_recipe, with_remat

replace = dataclasses.replace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A recipe timed in jaxdiff and in PyTorch.

    Attributes:
      recipe: name of the recipe.
      measure: times it, as `benchmarks.command.run` describes.
      batch_size: images in a step, or in a call of the sampler.
      repeats: timed turns.
      tiny: fields of a denoiser that a CPU can run.
    """

    recipe: str
    measure: Callable[..., Any]
    batch_size: int
    repeats: int
    tiny: dict[str, Any]


_TINY_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "transformer_layers": (1, 0),
    "heads": (2, 2),
    "cross_attention_dim": 32,
}
COMPARISONS = {
    "dit-xl2-train-256": Comparison(
        recipe="dit_xl2_imagenet256",
        measure=torch_baseline.measure,
        batch_size=64,
        repeats=20,
        tiny={"width": 64, "depth": 2, "heads": 2, "text_width": 32, "pooled_width": 32},
    ),
    "sd15-train-512": Comparison(
        recipe="sd15_scratch_512",
        measure=torch_baseline.measure,
        batch_size=16,
        repeats=10,
        tiny=_TINY_UNET,
    ),
    "sd15-sample-512": Comparison(
        recipe="sd15",
        measure=torch_sampling.measure,
        batch_size=8,
        repeats=5,
        tiny=_TINY_UNET,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time jaxdiff and PyTorch on one GPU."""

    only: tuple[str, ...] = ()
    """Some of the comparisons: dit-xl2-train-256, sd15-train-512, sd15-sample-512."""
    out: str = "benchmarks/results"
    """Folder of the reports."""
    tiny: bool = False
    """Small networks and three turns, on any device."""


def recipe_of(comparison: Comparison, *, tiny: bool) -> Config:
    """Return the recipe of a comparison: without remat, in bfloat16."""
    config = with_remat(load_recipe(find_recipe(comparison.recipe)), "none")
    train = replace(config.train, batch_size=comparison.batch_size, compute="bfloat16")
    if not tiny:
        return replace(config, train=train)
    task: Any = config.task
    text = ClipTextConfig(width=32, depth=1, heads=2)
    model = replace(
        task.model,
        denoiser=replace(task.model.denoiser, **comparison.tiny),
        conditioner=replace(task.model.conditioner, text=ClipTextEncoder(model=text)),
        autoencoder=replace(task.model.autoencoder, block_out_channels=(32, 32, 32, 32)),
        sampler=replace(task.model.sampler, num_steps=4),
        image_size=64,
    )
    return replace(
        config,
        task=replace(task, model=model),
        data=replace(config.data, transforms=replace(config.data.transforms, size=64)),
        train=replace(train, batch_size=jax.device_count()),
    )


def run_comparison(name: str, out: str, tiny: bool) -> None:
    """Time one comparison, print its report and write it to `out`.

    Raises:
      UserError: there is no GPU, or as the comparison raises.
    """
    if not tiny and jax.default_backend() != "gpu":
        raise UserError(
            f"JAX's device is a {jax.default_backend()}: expected a GPU; run "
            "pip install -e '.[gpu]', or give --tiny."
        )
    comparison = COMPARISONS[name]
    kind = jax.devices()[0].device_kind.replace(" ", "-").lower()
    options = TimingOptions(
        config=recipe_of(comparison, tiny=tiny),
        json=str(Path(out) / f"{kind}-{name}{'-tiny' if tiny else ''}.json"),
        repeats=3 if tiny else comparison.repeats,
        warmup=1,
    )
    measure_and_report(name, options, comparison.measure)


def main(options: Options) -> int:
    """Run the comparisons; return the exit status."""
    unknown = set(options.only) - COMPARISONS.keys()
    if unknown:
        print(f"one_gpu: There is no {min(unknown)!r}: expected some of {', '.join(COMPARISONS)}.")
        return 2
    # JAX reserves three quarters of the memory by default, which leaves PyTorch too little.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    failed = False
    for name in options.only or COMPARISONS:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                process.submit(run_comparison, name, options.out, options.tiny).result()
            except Exception as error:  # the others may still succeed
                print(f"{name}: {error}", file=sys.stderr)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
