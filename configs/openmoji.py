"""OpenMoji's people at work, with held-out combinations of profession, gender and skin tone.

Hardware: one CPU core.
Cost: 23 minutes.

    pip install -e '.[openmoji]' && python train.py configs/openmoji.py
    jaxdiff evaluate runs/openmoji

A U-Net that predicts x0 on pixels. Training takes 23 minutes on one core of an AMD EPYC (Zen 4).
The score is the fraction of 500 held-out prompts whose image is nearest to the prompted emoji among
the 18 of its profession: 100 % (ceiling 98.4 %, chance 14.0 %; 2026-11-22). All 3,903 emoji
(`--data.source.subset all`) need a GPU and more steps.
"""

from jaxdiff.data.loader import DataConfig
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.openmoji.source import OpenMoji
from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.diffusion.time_grids import TimeGrid
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.evaluation.openmoji import OpenMojiAccuracy
from jaxdiff.evaluation.samples import SampleGrid
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.models.denoisers.unet_small import UNetConfig
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.sampling.guidance.thresholds import StaticThreshold
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.training.ema import Ema
from jaxdiff.training.optimizer import AdamW, WarmupStableDecay
from jaxdiff.training.recipe import Config, TokenizerConfig, TrainConfig
from jaxdiff.training.tasks.diffusion import DiffusionTask

PROMPTS = (
    "a woman firefighter with dark skin",
    "a man cook with light skin",
    "an astronaut with medium skin",
    "a female judge with medium-light skin",
    "a man farmer with medium-dark skin",
    "a detective",
    "a woman scientist with light skin",
    "a guard with dark skin",
)


def get_config() -> Config:
    """Return the recipe."""
    text = ClipTextConfig(vocab_size=1024, length=32, width=128, depth=2, heads=4)
    return Config(
        name="openmoji",
        task=DiffusionTask(
            model=TextToImage(
                name="openmoji",
                denoiser=UNetConfig(widths=(64, 96, 128), text_width=128, pooled_width=128),
                # Randomly initialised and frozen: layer 0 is the token embeddings, whose sum
                # identifies each emoji.
                conditioner=ClipConditioner(text=ClipTextEncoder(model=text, hidden_layer=0)),
                prediction="x0",
                schedule=RectifiedFlow(),
                image_size=64,
                # Each prompt describes one emoji: guidance would only exaggerate its colours.
                sampler=Sampler(
                    grid=TimeGrid(shift=6.0), guidance_scale=1.0, threshold=StaticThreshold()
                ),
            ),
            objective=Denoising(times=LogitNormal(mean=1.5, std=1.5)),
        ),
        data=DataConfig(source=OpenMoji(subset="workers"), transforms=Transforms(size=64)),
        tokenizer=TokenizerConfig(vocab_size=1024, length=32, records=2000),
        optimizer=AdamW(
            learning_rate=1.5e-3,
            schedule=WarmupStableDecay(warmup_steps=50, decay_fraction=0.3, decay="linear"),
        ),
        ema=Ema(decay=0.998),
        train=TrainConfig(steps=4000, batch_size=16, checkpoint_every=500, log_every=50),
        evaluators=(SampleGrid(prompts=PROMPTS, every=1000), OpenMojiAccuracy(samples=500)),
    )
