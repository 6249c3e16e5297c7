"""JiT-L/16: a plain transformer on the pixels of captioned ImageNet at 256, without an autoencoder.

Hardware: TPU v5e:16x16, v6e:16x16 or v5p:4x4x4, or 8 H100.
Cost: planned: 0.26, 0.06, 0.45 or 1.7 days at 40 % utilisation; not trained yet.

    jaxdiff prepare IMAGENET images
    python train.py configs/jit_pixel_256.py --topology v5e:16x16

Batch 1024, 547 million parameters. `--topology` chooses the settings of one of these, for which
`jaxdiff plan configs/jit_pixel_256.py` compiles the step; without it, remat is "full":

    topology   mesh             remat  micro-batches  state/chip  days at 40 %
    v5e:16x16  data=2 fsdp=128  dots               1    0.07 GiB          0.26
    v6e:16x16  data=32 fsdp=8   dots               1    1.05 GiB          0.06
    v5p:4x4x4  data=8 fsdp=8    dots               1    1.05 GiB          0.45
    h100:8     data=1 fsdp=8    dots               1    1.05 GiB          1.68

State is weights, EMA, moments and frozen parts per chip; days assume 40 % of the chips' peak
FLOP/s. The recipe has not been trained yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.data.sources.array_record import ArrayRecord
from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.training.recipe import Config, PlannedTopology, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask


def get_config() -> Config:
    """Return a DiT with x0 prediction and a velocity loss (Li & He 2025, arXiv 2511.13720)."""
    base = load_recipe(Path(__file__).with_name("dit_xl2_imagenet256.py"))
    replace = dataclasses.replace
    assert isinstance(base.task, DiffusionTask)
    model = base.task.model
    return replace(
        base,
        name="jit_pixel_256",
        task=replace(
            base.task,
            model=replace(
                model,
                name="jit_pixel_256",
                denoiser=replace(
                    model.denoiser,
                    channels=3,
                    patch_size=16,
                    bottleneck=128,
                    width=1024,
                    depth=24,
                    heads=16,
                ),
                autoencoder=None,
                prediction="x0",
            ),
            pretrained=replace(base.task.pretrained, autoencoder=None),
            objective=Denoising(loss_space="velocity", times=LogitNormal(mean=0.8, std=0.8)),
        ),
        data=replace(
            base.data,
            source=ArrayRecord(path="images"),
            transforms=replace(base.data.transforms, crop="center", flip=True),
        ),
        train=replace(base.train, steps=750_000, batch_size=1024),
        slices=(
            PlannedTopology(topology="v5e:16x16", mesh=MeshConfig(data=2, fsdp=128), remat="dots"),
            PlannedTopology(topology="v6e:16x16", mesh=MeshConfig(data=32, fsdp=8), remat="dots"),
            PlannedTopology(topology="v5p:4x4x4", mesh=MeshConfig(data=8, fsdp=8), remat="dots"),
            PlannedTopology(topology="h100:8", mesh=MeshConfig(data=1, fsdp=8), remat="dots"),
        ),
    )
