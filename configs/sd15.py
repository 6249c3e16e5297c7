"""Stable Diffusion 1.5, fine-tuned on your own images.

Hardware: GPU of 40 GB or a TPU slice.
Cost: not measured yet.

    python train.py configs/sd15.py --data.source.path photos

The folder `photos` contains images with captions (a `metadata.jsonl`, or a `.txt` beside each). The
weights come from the hub, or from folders: `--task.pretrained.denoiser DIR`, and likewise
`text-encoders` and `autoencoder`. The U-Net is trained in bfloat16 with float32 masters, which take
14 GB with EMA and AdamW's moments, sharded over `--mesh.fsdp` devices; the other parts are frozen.
Speed and quality have not been measured yet.
"""

import dataclasses

from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.losses import MinSNR
from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.diffusion.time_grids import TrainStepGrid
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.presets import CLIP_L, SD1
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import PLMS
from jaxdiff.training.optimizer import AdamW, ConstantLR
from jaxdiff.training.recipe import Config, TokenizerConfig, TrainConfig
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def get_config() -> Config:
    """Return the whole U-Net on its own objective, weighted by min-SNR."""
    return Config(
        name="sd15",
        task=DiffusionTask(
            model=TextToImage(
                name="sd15",
                denoiser=dataclasses.replace(SD1, remat="full"),
                conditioner=ClipConditioner(text=ClipTextEncoder(model=CLIP_L), masked=False),
                autoencoder=AutoencoderConfig(),
                prediction="eps",
                schedule=ScaledLinear(),
                image_size=512,
                sampler=Sampler(
                    solver=PLMS(),
                    grid=TrainStepGrid(offset=1, ends_at="first_step"),
                    init_noise="unit",
                    num_steps=50,
                    guidance_scale=7.5,
                ),
            ),
            pretrained=Pretrained(denoiser=MODEL, text_encoders=MODEL, autoencoder=MODEL),
            objective=Denoising(weighting=MinSNR()),
        ),
        data=DataConfig(
            source=ImageFolder(path="images"),
            transforms=Transforms(size=512, crop="random", caption_dropout=0.1),
            workers=4,
        ),
        tokenizer=TokenizerConfig(vocab_size=49408, length=77),
        optimizer=AdamW(learning_rate=1e-5, schedule=ConstantLR(warmup_steps=500)),
        train=TrainConfig(steps=10_000, batch_size=8, compute="bfloat16", checkpoint_every=1000),
    )
