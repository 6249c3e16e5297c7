"""Z-Image, fine-tuned on your own images.

Hardware: TPU v5e:8x8, v5e:16x16, v6e:8x8, v5p:4x4x4 or 8 H100.
Cost: planned: 6.6, 6.6, 1.4, 2.8 or 10.5 hours on slices at 40 % utilisation; not trained yet.

    python train.py configs/z_image.py --data.source.path photos

As `configs/flux2_klein_4b.py`, with the 6.2 billion parameters of Z-Image's transformer, whose
masters, EMA and moments take 99 GB. A cached caption takes 2.6 MB. Times are logit-normal with the
model's static shift of 3. Speed and quality have not been measured yet.

`jaxdiff plan configs/z_image.py --quick` compiles the step for each of them:

    slice      batch  mesh            micro-batches  remat  state/chip  memory/chip  hours at 40 %
    v5e:8x8       64  data=1 fsdp=64              1  full     1.45 GiB    5.3 of 16            6.6
    v5e:16x16    256  data=4 fsdp=64              1  full     1.45 GiB    5.4 of 16            6.6
    v6e:8x8       64  data=1 fsdp=64              1  dots     1.45 GiB   16.8 of 32            1.4
    v5p:4x4x4     64  data=1 fsdp=64              1  dots     1.48 GiB   17.1 of 95            2.8
    h100:8        64  data=1 fsdp=8               4  dots    11.50 GiB   51.0 of 80           10.5

State is weights, EMA, moments and frozen parts; memory is that of the whole step in GiB. Hours are
those of 10,000 steps at 40 % of the chips' peak FLOP/s. Elsewhere the batch is 64 and remat "full".
On v5p:4x4x4 remat "none" saves 5 % of the products and needs 87 GiB.
"""

import dataclasses
from pathlib import Path

from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.time_grids import FlowGrid
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.models.conditioners.z_image import ZImageConditioner
from jaxdiff.pretrained.presets import FLUX1_AUTOENCODER, Z_IMAGE, Z_IMAGE_TEXT
from jaxdiff.training.recipe import Config, PlannedTopology, load_recipe
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
        slices=(
            PlannedTopology(topology="v5e:8x8", mesh=MeshConfig(data=1, fsdp=64)),
            PlannedTopology(topology="v5e:16x16", mesh=MeshConfig(data=4, fsdp=64), batch_size=256),
            PlannedTopology(topology="v6e:8x8", mesh=MeshConfig(data=1, fsdp=64), remat="dots"),
            PlannedTopology(topology="v5p:4x4x4", mesh=MeshConfig(data=1, fsdp=64), remat="dots"),
            PlannedTopology(
                topology="h100:8", mesh=MeshConfig(data=1, fsdp=8), accumulate=4, remat="dots"
            ),
        ),
    )
