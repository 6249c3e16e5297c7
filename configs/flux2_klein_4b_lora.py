"""FLUX.2-klein-base 4B with low-rank adapters, trained on your own images.

Hardware: one GPU.
Cost: not measured yet.

    python train.py configs/flux2_klein_4b_lora.py --data.source.path photos
    jaxdiff export runs/flux2_klein_4b_lora style --format lora

As `configs/flux2_klein_4b.py`, but only adapters are trained, of all projections of attention and
MLPs (`--task.trainable.lora.rank`). The frozen transformer takes 8 GB in bfloat16. Speed, memory
and quality have not been measured yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.models.lora import LoraConfig
from jaxdiff.training.recipe import Config, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, Trainable

LAYERS = ("q", "k", "v", "out", "inner", "outer")


def get_config() -> Config:
    """Return `configs/flux2_klein_4b.py` with adapters and their learning rate."""
    base = load_recipe(Path(__file__).with_name("flux2_klein_4b.py"))
    assert isinstance(base.task, DiffusionTask)
    lora = LoraConfig(rank=16, targets=LAYERS)
    model, denoiser = base.task.model, base.task.model.denoiser
    return dataclasses.replace(
        base,
        name="flux2_klein_4b_lora",
        task=dataclasses.replace(
            base.task,
            model=dataclasses.replace(model, denoiser=dataclasses.replace(denoiser, remat="full")),
            trainable=Trainable(lora=lora),
        ),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-4),
        train=dataclasses.replace(base.train, steps=2000, batch_size=4),
        mesh=MeshConfig(),
        slices=(),
    )
