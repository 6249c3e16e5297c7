"""A DiT of three billion parameters at 512 pixels, in the latents of SDXL's autoencoder.

Hardware: TPU v5e:16x16, v6e:16x16 or v5p:4x4x4, or 8 H100.
Cost: planned: 4.7, 1.0, 8.1 or 30 days at 40 % utilisation; not trained yet.

    jaxdiff prepare IMAGES images
    jaxdiff prepare configs/dit_3b_512.py latents_512 --latents.views 1
    python train.py configs/dit_3b_512.py --topology v5e:16x16

Batch 2048, 3.06 billion parameters. `--topology` chooses the settings of one of these, for which
`jaxdiff plan configs/dit_3b_512.py` compiles the step; without it, remat is "full":

    topology   mesh             remat  micro-batches  state/chip  days at 40 %
    v5e:16x16  data=16 fsdp=16  dots               2    2.95 GiB          4.73
    v6e:16x16  data=16 fsdp=16  dots               2    2.95 GiB          1.01
    v5p:4x4x4  data=4 fsdp=16   dots               2    2.95 GiB          8.11
    h100:8     data=1 fsdp=8    full               8    5.89 GiB         30.13

State is weights, EMA, moments and frozen parts per chip; days assume 40 % of the chips' peak
FLOP/s. The recipe has not been trained yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.data.sources.array_record import ArrayRecord
from jaxdiff.data.sources.cached_latents import CachedLatents
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.pretrained.presets import OPENCLIP_G, XL_SCALING_FACTOR
from jaxdiff.training.optimizer import AdamW, CosineLR
from jaxdiff.training.recipe import Config, PlannedTopology, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"


def get_config() -> Config:
    """Return `configs/dit_xl2_imagenet256.py`, larger, on 1024 tokens, with OpenCLIP bigG."""
    base = load_recipe(Path(__file__).with_name("dit_xl2_imagenet256.py"))
    replace = dataclasses.replace
    assert isinstance(base.task, DiffusionTask)
    model = base.task.model
    return replace(
        base,
        name="dit_3b_512",
        task=replace(
            base.task,
            model=replace(
                model,
                name="dit_3b_512",
                # Heads of 128 channels suit a TPU's matrix units and its attention kernel.
                denoiser=replace(
                    model.denoiser,
                    width=2048,
                    depth=34,
                    heads=16,
                    text_width=1280,
                    pooled_width=1280,
                ),
                conditioner=ClipConditioner(
                    text=ClipTextEncoder(model=OPENCLIP_G, hidden_layer=-2, final_norm=False)
                ),
                autoencoder=AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR),
                image_size=512,
            ),
            pretrained=Pretrained(text_encoders=MODEL, autoencoder=MODEL),
        ),
        data=replace(
            base.data,
            source=CachedLatents(path="latents_512", of=ArrayRecord(path="images")),
            transforms=replace(base.data.transforms, size=512),
        ),
        optimizer=AdamW(
            learning_rate=1e-4, weight_decay=0.01, schedule=CosineLR(warmup_steps=5000, final=0.1)
        ),
        train=replace(base.train, steps=300_000),
        slices=(
            PlannedTopology(
                topology="v5e:16x16", mesh=MeshConfig(data=16, fsdp=16), remat="dots", accumulate=2
            ),
            PlannedTopology(
                topology="v6e:16x16", mesh=MeshConfig(data=16, fsdp=16), remat="dots", accumulate=2
            ),
            PlannedTopology(
                topology="v5p:4x4x4", mesh=MeshConfig(data=4, fsdp=16), remat="dots", accumulate=2
            ),
            PlannedTopology(topology="h100:8", mesh=MeshConfig(data=1, fsdp=8), accumulate=8),
        ),
    )
