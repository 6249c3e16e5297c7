"""Text to images of fruit and vegetables: the default recipe.

    python train.py

Made for two CPU cores without an accelerator, where it takes less than 9 minutes, scoring included,
and 2 GB of memory (AMD EPYC, Zen 4, 2026-11-22). That is little: of 64 single objects in held-out
combinations 97 % stand where they were asked to, 94 % have the right colour, 31 % are of the right
kind, and 17 % are right in every attribute. `configs/produce_long.py` is the same for longer.
"""

from jaxdiff.config import Config, TrainConfig
from jaxdiff.data.pipeline import DataConfig
from jaxdiff.data.produce import Produce
from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.losses import Objective
from jaxdiff.diffusion.schedules import RectifiedFlow, TimeGrid
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.models.clip import ClipTextConfig
from jaxdiff.models.unet import UNetConfig
from jaxdiff.sampling.guidance import StaticThreshold
from jaxdiff.sampling.settings import SamplingConfig
from jaxdiff.training.diffusion import DiffusionTask, TextTower
from jaxdiff.training.ema import Ema
from jaxdiff.training.optimizer import AdamW, WarmupStableDecay

PROMPTS = (
    "a small green pea",
    "a large ripe tomato with a stem",
    "a large blue banana on the left",
    "three small yellow lemons",
    "a purple pepper without a stem",
    "a banana left of a red tomato",
    "a small orange carrot above a purple aubergine",
    "a large red strawberry in the middle",
)


def get_config() -> Config:
    """A small U-Net on pixels that predicts x0, told of prompts by a small text encoder."""
    return Config(
        name="produce",
        task=DiffusionTask(
            denoiser=UNetConfig(widths=(64, 96, 128), text_width=128, pooled_width=128),
            text=TextTower(
                model=ClipTextConfig(
                    vocab_size=1024,
                    length=32,
                    width=128,
                    depth=2,
                    heads=4,
                    activation="gelu",
                    projection_dim=128,
                ),
                pretrained="shipped:produce_clip",
                trained=False,
                layer=0,
            ),
            objective=Objective(
                prediction="x0",
                loss_on="x0",
                schedule=RectifiedFlow(),
                times=LogitNormal(mean=1.5, std=1.5),
            ),
        ),
        # Mostly single objects: one thing at a time for so short a run.
        data=DataConfig(
            source=Produce(length=10_000_000, group_share=0.1, pair_share=0.1),
            transforms=Transforms(size=64),
        ),
        optimizer=AdamW(
            learning_rate=1.5e-3,
            schedule=WarmupStableDecay(warmup_steps=50, decay_share=0.3, decay="linear"),
        ),
        ema=Ema(decay=0.998),
        train=TrainConfig(steps=1400, batch_size=16, checkpoint_every=500, log_every=50),
        sampling=SamplingConfig(
            grid=TimeGrid(shift=6.0), threshold=StaticThreshold(), prompts=PROMPTS
        ),
        eval_samples=64,
    )
