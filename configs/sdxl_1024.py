"""Stable Diffusion XL's U-Net from scratch at 1024 pixels, on cached latents of nine shapes.

Hardware: TPU v5e:16x16, v6e:16x16 or v5p:4x4x4, or 8 H100.
Cost: planned: 14, 3.1, 25 or 92 days at 40 % utilisation; not trained yet.

    jaxdiff prepare IMAGES images
    jaxdiff prepare configs/sdxl_1024.py latents_1024 --latents.views 1
    python train.py configs/sdxl_1024.py --topology v5e:16x16

Batch 2048, remat "full", 2.57 billion parameters. `jaxdiff plan configs/sdxl_1024.py`
compiles the step for each of these topologies:

    slice      mesh               micro-batches  state/chip  days at 40 %
    v5e:16x16  data=16 fsdp=16                4    2.53 GiB         14.38
    v6e:16x16  data=16 fsdp=16                4    2.52 GiB          3.09
    v5p:4x4x4  data=4 fsdp=16                 4    2.52 GiB         24.69
    h100:8     data=1 fsdp=8                 32    5.01 GiB         91.65

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
    """Return `configs/sdxl.py` from scratch; batch size of Podell et al. 2023, section 2.5."""
    base, replace = load_recipe(Path(__file__).with_name("sdxl.py")), dataclasses.replace
    assert isinstance(base.task, DiffusionTask)
    return replace(
        base,
        name="sdxl_1024",
        task=replace(base.task, pretrained=replace(base.task.pretrained, denoiser=None)),
        data=replace(
            base.data,
            source=CachedLatents(path="latents_1024", of=ArrayRecord(path="images")),
            transforms=replace(base.data.transforms, crop="center"),
        ),
        optimizer=AdamW(learning_rate=1e-4, schedule=ConstantLR(warmup_steps=10_000)),
        ema=Ema(decay=0.9999),
        train=replace(base.train, steps=600_000, batch_size=2048, checkpoint_every=2000),
        slices=(
            PlannedTopology(topology="v5e:16x16", mesh=MeshConfig(data=16, fsdp=16), accumulate=4),
            PlannedTopology(topology="v6e:16x16", mesh=MeshConfig(data=16, fsdp=16), accumulate=4),
            PlannedTopology(topology="v5p:4x4x4", mesh=MeshConfig(data=4, fsdp=16), accumulate=4),
            PlannedTopology(topology="h100:8", mesh=MeshConfig(data=1, fsdp=8), accumulate=32),
        ),
    )
