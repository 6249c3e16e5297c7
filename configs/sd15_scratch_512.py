"""Stable Diffusion 1.5's U-Net from scratch at 512 pixels, on cached latents.

Hardware: TPU v5e:16x16, v6e:16x16 or v5p:4x4x4, or 8 H100.
Cost: planned: 1.4, 0.31, 2.4 or 9.1 days at 40 % utilisation; not trained yet.

    jaxdiff prepare IMAGES images
    jaxdiff prepare configs/sd15_scratch_512.py latents_512 --latents.views 1
    python train.py configs/sd15_scratch_512.py --topology v5e:16x16

Batch 2048, 860 million parameters. `--topology` chooses the settings of one of these, for which
`jaxdiff plan configs/sd15_scratch_512.py` compiles the step; without it, remat is "full":

    topology   mesh             remat  micro-batches  state/chip  days at 40 %
    v5e:16x16  data=16 fsdp=16  dots               1    0.83 GiB          1.42
    v6e:16x16  data=32 fsdp=8   full               1    1.66 GiB          0.31
    v5p:4x4x4  data=8 fsdp=8    full               1    1.66 GiB          2.44
    h100:8     data=1 fsdp=8    full               8    1.66 GiB          9.07

State is weights, EMA, moments and frozen parts per chip; days assume 40 % of the chips' peak
FLOP/s. The recipe has not been trained yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.data.sources.array_record import ArrayRecord
from jaxdiff.data.sources.cached_latents import CachedLatents
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.training.ema import Ema
from jaxdiff.training.optimizer import AdamW, ConstantLR
from jaxdiff.training.recipe import Config, PlannedTopology, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask


def get_config() -> Config:
    """Return `configs/sd15.py` with a randomly initialised U-Net and the original batch size."""
    base, replace = load_recipe(Path(__file__).with_name("sd15.py")), dataclasses.replace
    assert isinstance(base.task, DiffusionTask)
    return replace(
        base,
        name="sd15_scratch_512",
        task=replace(base.task, pretrained=replace(base.task.pretrained, denoiser=None)),
        data=replace(
            base.data,
            source=CachedLatents(path="latents_512", of=ArrayRecord(path="images")),
            transforms=replace(base.data.transforms, crop="center"),
        ),
        optimizer=AdamW(learning_rate=1e-4, schedule=ConstantLR(warmup_steps=10_000)),
        ema=Ema(decay=0.9999),
        train=replace(base.train, steps=500_000, batch_size=2048, checkpoint_every=2000),
        slices=(
            PlannedTopology(topology="v5e:16x16", mesh=MeshConfig(data=16, fsdp=16), remat="dots"),
            PlannedTopology(topology="v6e:16x16", mesh=MeshConfig(data=32, fsdp=8)),
            PlannedTopology(topology="v5p:4x4x4", mesh=MeshConfig(data=8, fsdp=8)),
            PlannedTopology(topology="h100:8", mesh=MeshConfig(data=1, fsdp=8), accumulate=8),
        ),
    )
