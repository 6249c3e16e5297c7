"""Stable Diffusion XL with low-rank adapters, trained on your own images.

Hardware: one GPU.
Cost: not measured yet.

    python train.py configs/sdxl_lora.py --data.source.path photos
    jaxdiff export runs/sdxl_lora style --format lora

As `configs/sdxl.py`, but only adapters of the attention layers (`--task.trainable.lora.rank`) are
trained, 0.9 % as many parameters: checkpoints take megabytes. The second command writes them for
diffusers' `load_lora_weights` and `sample.py --lora style`. Speed, memory and quality have not been
measured yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.models.lora import LoraConfig
from jaxdiff.training.recipe import Config, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, Trainable


def get_config() -> Config:
    """Return `configs/sdxl.py` with adapters and their learning rate."""
    base = load_recipe(Path(__file__).with_name("sdxl.py"))
    assert isinstance(base.task, DiffusionTask)
    return dataclasses.replace(
        base,
        name="sdxl_lora",
        task=dataclasses.replace(base.task, trainable=Trainable(lora=LoraConfig(rank=16))),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-4),
        train=dataclasses.replace(base.train, steps=2000),
    )
