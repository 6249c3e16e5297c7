"""Stable Diffusion 1.5 in 4 steps: consistency distillation of low-rank adapters (LCM-LoRA).

Hardware: one GPU.
Cost: not measured yet.

    python train.py configs/sd15_lcm_lora.py --data.source.path photos
    python sample.py "a photo of a dog" --model runs/sd15_lcm_lora
    jaxdiff export runs/sd15_lcm_lora lcm --format lora

The student follows the guided model on a grid of 50 DDIM steps, as an adapter of rank 64 of all
layers that diffusers' `train_lcm_distill_lora_sd_wds.py` adapts, with its learning rate, batch
size, Huber loss, and time grid (Luo et al. 2023, arXiv 2311.05556). The differences: one guidance
scale in place of scales from 5 to 15, and an average of the adapters (Luo et al. 2023, arXiv
2310.04378) as the target. The third command writes a file for diffusers' `load_lora_weights` with
`LCMScheduler`. Speed, memory and quality have not been measured yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.diffusion.distillation import ConsistencyDistillation
from jaxdiff.diffusion.time_grids import ConsistencyGrid
from jaxdiff.models.lora import LoraConfig
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_sde import LCM
from jaxdiff.training.ema import Ema
from jaxdiff.training.optimizer import AdamW, ConstantLR
from jaxdiff.training.recipe import Config, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, Trainable

ATTENTION = ("q", "k", "v", "out", "proj_in", "proj_out")
OTHERS = ("inner", "outer", "conv1", "conv2", "shortcut", "resample", "time")


def get_config() -> Config:
    """Return `configs/sd15.py` with adapters that learn to sample in few steps."""
    base, replace = load_recipe(Path(__file__).with_name("sd15.py")), dataclasses.replace
    assert isinstance(base.task, DiffusionTask)
    sampler = Sampler(
        solver=LCM(), grid=ConsistencyGrid(), num_steps=4, guidance_scale=1.0, init_noise="unit"
    )
    return replace(
        base,
        name="sd15_lcm_lora",
        task=replace(
            base.task,
            model=replace(base.task.model, sampler=sampler),
            trainable=Trainable(lora=LoraConfig(rank=64, targets=(*ATTENTION, *OTHERS))),
            objective=ConsistencyDistillation(
                grid=ConsistencyGrid(), steps=50, segments=1, guidance_scale=7.5, huber=0.001
            ),
        ),
        data=replace(base.data, transforms=replace(base.data.transforms, caption_dropout=0.0)),
        optimizer=AdamW(learning_rate=1e-4, weight_decay=0.0, schedule=ConstantLR(warmup_steps=0)),
        ema=Ema(decay=0.95),
        train=replace(base.train, steps=1000, batch_size=12),
    )
