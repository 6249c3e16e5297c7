"""Z-Image with low-rank adapters, trained on your own images.

Hardware: one GPU, TPU v5e:8x8, v5e:16x16, v6e:8x8, v5p:4x4x4 or 8 H100.
Cost: planned: 0.88, 0.88, 0.19, 0.38 or 1.4 hours on slices at 40 % utilisation; not trained yet.

    python train.py configs/z_image_lora.py --data.source.path photos
    jaxdiff export runs/z_image_lora style --format lora

As `configs/z_image.py`, but only adapters are trained, of all projections of attention and MLPs
(`--task.trainable.lora.rank`). The frozen transformer takes 12 GB in bfloat16. Speed, memory and
quality have not been measured yet.

`jaxdiff plan configs/z_image_lora.py --quick` compiles the step for each of them:

    slice      batch  mesh             micro-batches  remat  state/chip  memory/chip  hours at 40 %
    v5e:8x8       64  data=4 fsdp=16               1  full     0.77 GiB    4.2 of 16           0.88
    v5e:16x16    256  data=16 fsdp=16              1  full     0.77 GiB    4.2 of 16           0.88
    v6e:8x8       64  data=16 fsdp=4               1  dots     3.05 GiB   29.5 of 32           0.19
    v5p:4x4x4     64  data=64 fsdp=1               1  dots    12.21 GiB   38.6 of 95           0.38
    h100:8        64  data=8 fsdp=1                4  dots    12.21 GiB   65.3 of 80            1.4

State is weights, EMA, moments and frozen parts; memory is that of the whole step in GiB. Hours are
those of 2,000 steps at 40 % of the chips' peak FLOP/s. On one device the batch is 4.
"""

import dataclasses
from pathlib import Path

from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.models.lora import LoraConfig
from jaxdiff.training.recipe import Config, PlannedTopology, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, Trainable

LAYERS = ("q", "k", "v", "out", "gate", "up", "down")


def get_config() -> Config:
    """Return `configs/z_image.py` with adapters and their learning rate."""
    base = load_recipe(Path(__file__).with_name("z_image.py"))
    assert isinstance(base.task, DiffusionTask)
    trainable = Trainable(lora=LoraConfig(rank=16, targets=LAYERS))
    return dataclasses.replace(
        base,
        name="z_image_lora",
        task=dataclasses.replace(base.task, trainable=trainable),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-4),
        train=dataclasses.replace(base.train, steps=2000, batch_size=4),
        mesh=MeshConfig(),
        slices=(
            PlannedTopology(topology="v5e:8x8", mesh=MeshConfig(data=4, fsdp=16), batch_size=64),
            PlannedTopology(
                topology="v5e:16x16", mesh=MeshConfig(data=16, fsdp=16), batch_size=256
            ),
            PlannedTopology(
                topology="v6e:8x8", mesh=MeshConfig(data=16, fsdp=4), batch_size=64, remat="dots"
            ),
            PlannedTopology(
                topology="v5p:4x4x4", mesh=MeshConfig(data=64, fsdp=1), batch_size=64, remat="dots"
            ),
            PlannedTopology(
                topology="h100:8",
                mesh=MeshConfig(data=8, fsdp=1),
                accumulate=4,
                batch_size=64,
                remat="dots",
            ),
        ),
    )
