"""The shipped icons model, distilled to 4 evaluations without guidance.

Hardware: one CPU core.
Cost: 80 minutes, after 4 for the cache of latents.

    pip install -e '.[icons]'
    python train.py configs/icons_distilled.py --data.source.download True
    jaxdiff export runs/icons_distilled distilled --format adapters

The student is the teacher with adapters of rank 16 at all layers, which take 2 MB. Each of its 4
steps equals 3 guided DDIM steps of the teacher. With products in bfloat16
(`JAX_DEFAULT_MATMUL_PRECISION=bfloat16`) and beside other work it saw 40 to 50 images/s on one core
of an Intel Xeon, and 100 to 145 on two with a device on each; the cost above is for one. The run
was one of 1,500 steps with its decay, extended (2026-12-01). It ships as `shipped:icons_distilled`:
its joint scores sum to 0.97 of those of the teacher at 24 steps, in 0.19 of the time. With all
weights trained instead of adapters, pairs scored lower.
"""

import dataclasses
from pathlib import Path

from jaxdiff.diffusion.distillation import ConsistencyDistillation
from jaxdiff.models.lora import LoraConfig
from jaxdiff.training.recipe import Config, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, Trainable

ATTENTION, MLP = ("q", "k", "v", "out"), ("gate", "up", "down")
OTHERS = ("modulation", "patch", "words", "pooled", "time1", "time2", "final_modulation", "final")


def get_config() -> Config:
    """Return `configs/produce_distilled.py` with the model and the data of `configs/icons.py`."""
    folder, replace = Path(__file__).parent, dataclasses.replace
    icons, distilled = (load_recipe(folder / f"{x}.py") for x in ("icons", "produce_distilled"))
    assert isinstance(icons.task, DiffusionTask)
    assert isinstance(distilled.task, DiffusionTask)
    objective, teacher = distilled.task.objective, icons.task.model.sampler
    assert isinstance(objective, ConsistencyDistillation)
    assert teacher.grid is not None
    return replace(
        icons,
        name="icons_distilled",
        task=replace(
            icons.task,
            model=replace(
                icons.task.model,
                name="icons_distilled",
                sampler=replace(distilled.task.model.sampler, grid=teacher.grid),
            ),
            pretrained=replace(icons.task.pretrained, denoiser="shipped:icons"),
            trainable=Trainable(lora=LoraConfig(rank=16, targets=(*ATTENTION, *MLP, *OTHERS))),
            objective=replace(objective, grid=teacher.grid),
        ),
        optimizer=distilled.optimizer,
        ema=distilled.ema,
        train=replace(icons.train, steps=3500, checkpoint_every=250),
    )
