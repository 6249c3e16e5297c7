"""Stable Diffusion XL, fine-tuned on your own images.

Hardware: GPU of 80 GB or a TPU slice.
Cost: not measured yet.

    python train.py configs/sdxl.py --data.source.path photos

Data and weights are as in `configs/sd15.py`. Masters, EMA and moments take 41 GB, sharded over
`--mesh.fsdp` devices. Each batch has one of nine shapes, from 768 x 1344 to 1344 x 768, and the
step compiles once per shape. The model is conditioned on the size and crop of every image. Speed
and quality have not been measured yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.data.buckets import Buckets
from jaxdiff.diffusion.time_grids import TrainStepGrid
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import ClipTextEncoder, StableDiffusionXLConditioner
from jaxdiff.pretrained.presets import CLIP_L, OPENCLIP_G, XL, XL_SCALING_FACTOR
from jaxdiff.sampling.solvers_ode import Euler
from jaxdiff.training.recipe import Config, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"


def get_config() -> Config:
    """Return `configs/sd15.py` with the networks of XL, two text encoders and 1024 pixels."""
    base, replace = load_recipe(Path(__file__).with_name("sd15.py")), dataclasses.replace
    assert isinstance(base.task, DiffusionTask)
    model = base.task.model
    text = ClipTextEncoder(model=CLIP_L, hidden_layer=-2, final_norm=False)
    return replace(
        base,
        name="sdxl",
        task=replace(
            base.task,
            model=replace(
                model,
                name="sdxl",
                denoiser=replace(XL, remat="full"),
                conditioner=StableDiffusionXLConditioner(
                    text=text, text_2=replace(text, model=OPENCLIP_G)
                ),
                autoencoder=AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR),
                image_size=1024,
                sampler=replace(
                    model.sampler,
                    solver=Euler(),
                    grid=TrainStepGrid(offset=1, rounded=False),
                    guidance_scale=5.0,
                ),
            ),
            pretrained=Pretrained(denoiser=MODEL, text_encoders=MODEL, autoencoder=MODEL),
        ),
        data=replace(
            base.data, transforms=replace(base.data.transforms, size=1024, buckets=Buckets())
        ),
    )
