"""Z-Image with low-rank adapters, trained on your own images.

Hardware: one GPU.
Cost: not measured yet.

    python train.py configs/z_image_lora.py --data.source.path photos
    jaxdiff export runs/z_image_lora style --format lora

As `configs/z_image.py`, but only adapters are trained, of all projections of attention and MLPs
(`--task.trainable.lora.rank`). The frozen transformer takes 12 GB in bfloat16. Speed, memory and
quality have not been measured yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.models.lora import LoraConfig
from jaxdiff.training.recipe import Config, load_recipe
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
    )
