"""DiT-XL/2 on captioned ImageNet at 256 pixels, in the latents of Stable Diffusion's autoencoder.

Hardware: TPU v5e:16x16, v6e:16x16 or v5p:4x4x4, or 8 H100.
Cost: planned: 0.20, 0.04, 0.35 or 1.3 days at 40 % utilisation; not trained yet.

    jaxdiff prepare IMAGES images
    jaxdiff prepare configs/dit_xl2_imagenet256.py imagenet256_latents --latents.views 2
    python train.py configs/dit_xl2_imagenet256.py --topology v5e:16x16

Batch 2048, 800 million parameters. `--topology` chooses the settings of one of these, for which
`jaxdiff plan configs/dit_xl2_imagenet256.py` compiles the step; without it, remat is "full":

    topology   mesh             remat  micro-batches  state/chip  days at 40 %
    v5e:16x16  data=16 fsdp=16  dots               1    0.78 GiB          0.20
    v6e:16x16  data=1 fsdp=256  dots               1    3.41 GiB          0.04
    v5p:4x4x4  data=8 fsdp=8    dots               1    1.55 GiB          0.35
    h100:8     data=1 fsdp=8    full               1    1.55 GiB          1.30

State is weights, EMA, moments and frozen parts per chip; days assume 40 % of the chips' peak
FLOP/s. The recipe has not been trained yet.
"""

from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.array_record import ArrayRecord
from jaxdiff.data.sources.cached_latents import CachedLatents
from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.presets import CLIP_L
from jaxdiff.training.ema import Ema
from jaxdiff.training.optimizer import AdamW, ConstantLR
from jaxdiff.training.recipe import Config, PlannedTopology, TokenizerConfig, TrainConfig
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def get_config() -> Config:
    """Return DiT-XL/2: 28 blocks of width 1152, 16 heads (Peebles & Xie 2023, table 1)."""
    return Config(
        name="dit_xl2_imagenet256",
        task=DiffusionTask(
            model=TextToImage(
                name="dit_xl2_imagenet256",
                denoiser=DiTConfig(
                    channels=4,
                    patch_size=2,
                    width=1152,
                    depth=28,
                    heads=16,
                    text_width=768,
                    pooled_width=768,
                    remat="full",
                ),
                conditioner=ClipConditioner(text=ClipTextEncoder(model=CLIP_L)),
                autoencoder=AutoencoderConfig(),
                prediction="velocity",
                schedule=RectifiedFlow(),
                image_size=256,
            ),
            pretrained=Pretrained(text_encoders=MODEL, autoencoder=MODEL),
            objective=Denoising(times=LogitNormal()),
        ),
        data=DataConfig(
            source=CachedLatents(path="imagenet256_latents", of=ArrayRecord(path="images")),
            transforms=Transforms(size=256, caption_dropout=0.1),
            workers=4,
        ),
        tokenizer=TokenizerConfig(vocab_size=49408, length=77),
        optimizer=AdamW(
            learning_rate=2e-4, weight_decay=0.0, schedule=ConstantLR(warmup_steps=2000)
        ),
        ema=Ema(decay=0.9999),
        train=TrainConfig(
            steps=200_000,
            batch_size=2048,
            compute="bfloat16",
            checkpoint_every=2000,
        ),
        mesh=MeshConfig(data=-1),
        slices=(
            PlannedTopology(topology="v5e:16x16", mesh=MeshConfig(data=16, fsdp=16), remat="dots"),
            PlannedTopology(topology="v6e:16x16", mesh=MeshConfig(data=1, fsdp=256), remat="dots"),
            PlannedTopology(topology="v5p:4x4x4", mesh=MeshConfig(data=8, fsdp=8), remat="dots"),
            PlannedTopology(topology="h100:8", mesh=MeshConfig(data=1, fsdp=8)),
        ),
    )
