"""FLUX.2-klein-base 4B with low-rank adapters, trained on your own images.

Hardware: one GPU, TPU v5e:8x8, v5e:16x16, v6e:8x8, v5p:4x4x4 or 8 H100.
Cost: planned: 0.49, 0.49, 0.11, 0.21 or 0.78 hours on slices at 40 % utilisation; not trained yet.

    python train.py configs/flux2_klein_4b_lora.py --data.source.path photos
    jaxdiff export runs/flux2_klein_4b_lora style --format lora

As `configs/flux2_klein_4b.py`, but only adapters are trained, of all projections of attention and
MLPs (`--task.trainable.lora.rank`). The frozen transformer takes 8 GB in bfloat16. Speed, memory
and quality have not been measured yet.

`jaxdiff plan configs/flux2_klein_4b_lora.py --quick` compiles the step for each of them:

    slice      batch  mesh            micro-batches  remat  state/chip  memory/chip  hours at 40 %
    v5e:8x8       64  data=8 fsdp=8               1  full     0.97 GiB    3.6 of 16           0.49
    v5e:16x16    256  data=32 fsdp=8              1  full     0.97 GiB    3.6 of 16           0.49
    v6e:8x8       64  data=64 fsdp=1              1  full     7.73 GiB   10.3 of 32           0.11
    v5p:4x4x4     64  data=64 fsdp=1              1  none     7.73 GiB   42.0 of 95           0.21
    h100:8        64  data=8 fsdp=1               8  none     7.73 GiB   42.4 of 80           0.78

State is weights, EMA, moments and frozen parts; memory is that of the whole step in GiB. Hours are
those of 2,000 steps at 40 % of the chips' peak FLOP/s. On one device the batch is 4.
"""

import dataclasses
from pathlib import Path

from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.models.lora import LoraConfig
from jaxdiff.training.recipe import Config, PlannedTopology, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, Trainable

LAYERS = ("q", "k", "v", "out", "inner", "outer")


def get_config() -> Config:
    """Return `configs/flux2_klein_4b.py` with adapters and their learning rate."""
    base = load_recipe(Path(__file__).with_name("flux2_klein_4b.py"))
    assert isinstance(base.task, DiffusionTask)
    lora = LoraConfig(rank=16, targets=LAYERS)
    return dataclasses.replace(
        base,
        name="flux2_klein_4b_lora",
        task=dataclasses.replace(base.task, trainable=Trainable(lora=lora)),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-4),
        train=dataclasses.replace(base.train, steps=2000, batch_size=4),
        mesh=MeshConfig(),
        slices=(
            PlannedTopology(topology="v5e:8x8", mesh=MeshConfig(data=8, fsdp=8), batch_size=64),
            PlannedTopology(topology="v5e:16x16", mesh=MeshConfig(data=32, fsdp=8), batch_size=256),
            PlannedTopology(topology="v6e:8x8", mesh=MeshConfig(data=64, fsdp=1), batch_size=64),
            PlannedTopology(
                topology="v5p:4x4x4", mesh=MeshConfig(data=64, fsdp=1), batch_size=64, remat="none"
            ),
            PlannedTopology(
                topology="h100:8",
                mesh=MeshConfig(data=8, fsdp=1),
                accumulate=8,
                batch_size=64,
                remat="none",
            ),
        ),
    )
