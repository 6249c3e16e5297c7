"""Z-Image, fine-tuned on your own images.

Hardware: TPU slice or several GPUs.
Cost: not measured yet.

    python train.py configs/z_image.py --data.source.path photos

As `configs/flux2_klein_4b.py`, with the 6.2 billion parameters of Z-Image's transformer, of which
masters, EMA and moments take 99 GB. A cached caption takes 2.6 MB. Times are logit-normal with the
model's static shift of 3. Speed and quality have not been measured yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.time_grids import FlowGrid
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.models.conditioners.z_image import ZImageConditioner
from jaxdiff.pretrained.presets import FLUX1_AUTOENCODER, Z_IMAGE, Z_IMAGE_TEXT
from jaxdiff.training.recipe import Config, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained

MODEL = "Tongyi-MAI/Z-Image"
SHIFT = 3.0


def get_config() -> Config:
    """Return `configs/flux2_klein_4b.py` with the networks and times of Z-Image."""
    base, replace = load_recipe(Path(__file__).with_name("flux2_klein_4b.py")), dataclasses.replace
    assert isinstance(base.task, DiffusionTask)
    model = base.task.model
    return replace(
        base,
        name="z_image",
        task=replace(
            base.task,
            model=replace(
                model,
                name="z_image",
                denoiser=replace(Z_IMAGE, remat="full"),
                conditioner=ZImageConditioner(text=Z_IMAGE_TEXT),
                autoencoder=FLUX1_AUTOENCODER,
                sampler=replace(model.sampler, grid=FlowGrid(shift=SHIFT)),
            ),
            pretrained=Pretrained(denoiser=MODEL, text_encoders=MODEL, autoencoder=MODEL),
            objective=Denoising(times=LogitNormal(shift=SHIFT)),
        ),
        slices=(),
    )
