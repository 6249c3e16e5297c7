"""FLUX.2-klein-base 4B, fine-tuned on your own images.

Hardware: TPU v5e:8x8, v5e:16x16, v6e:8x8, v5p:4x4x4 or 8 H100.
Cost: planned: 3.7, 3.7, 0.79, 1.6 or 5.9 hours on slices at 40 % utilisation; not trained yet.

    python train.py configs/flux2_klein_4b.py --data.source.path photos

The folder `photos` contains images with captions, as for `configs/sd15.py`; the weights come from
the hub, or from folders. The 3.9 billion parameters of the transformer are trained in bfloat16 with
float32 masters, which take 62 GB with EMA and AdamW's moments, sharded over `--mesh.fsdp` devices.
The run first encodes images and captions into its folder: a caption takes 8 MB, for 512 tokens of
three hidden states of Qwen3. Each batch has one of nine shapes around 1024 x 1024. Times are
logit-normal (Esser et al. 2024, section 3.1); of ten captions one is empty, for classifier-free
guidance. Images for editing name reference images (`--data.source.reference COLUMN` and
`--data.transforms.references 1`). Speed and quality have not been measured yet.

`jaxdiff plan configs/flux2_klein_4b.py --quick` compiles the step for each of them:

    slice      batch  mesh            micro-batches  remat  state/chip  memory/chip  hours at 40 %
    v5e:8x8       64  data=1 fsdp=64              1  full     0.91 GiB    3.8 of 16            3.7
    v5e:16x16    256  data=4 fsdp=64              1  dots     0.91 GiB   12.3 of 16            3.7
    v6e:8x8       64  data=1 fsdp=64              1  dots     0.91 GiB   12.3 of 32           0.79
    v5p:4x4x4     64  data=1 fsdp=64              1  none     0.91 GiB   47.2 of 95            1.6
    h100:8        64  data=1 fsdp=8               2  dots     7.24 GiB   58.4 of 80            5.9

State is weights, EMA, moments and frozen parts; memory is that of the whole step in GiB. Hours are
those of 10,000 steps at 40 % of the chips' peak FLOP/s. Elsewhere the batch is 64 and remat "full".
"""

import dataclasses

from jaxdiff.data.buckets import Buckets
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.cached_latents import LatentOptions
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.diffusion.time_grids import FlowGrid
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.diffusion.time_shifts import EmpiricalShift
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.models.autoencoders.flux2 import Flux2AutoencoderConfig
from jaxdiff.models.conditioners.flux2 import Flux2Conditioner
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.presets import KLEIN_4B, KLEIN_4B_TEXT
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import Euler
from jaxdiff.training.optimizer import AdamW, ConstantLR
from jaxdiff.training.recipe import Config, PlannedTopology, TokenizerConfig, TrainConfig
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained

MODEL = "black-forest-labs/FLUX.2-klein-base-4B"


def get_config() -> Config:
    """Return the whole transformer on its own objective, on cached latents and text."""
    return Config(
        name="flux2_klein_4b",
        task=DiffusionTask(
            model=TextToImage(
                name="flux2_klein_4b",
                denoiser=dataclasses.replace(KLEIN_4B, remat="full"),
                conditioner=Flux2Conditioner(text=KLEIN_4B_TEXT),
                autoencoder=Flux2AutoencoderConfig(),
                prediction="velocity",
                schedule=RectifiedFlow(),
                image_size=1024,
                sampler=Sampler(
                    solver=Euler(),
                    grid=FlowGrid(token_shift=EmpiricalShift()),
                    num_steps=50,
                    guidance_scale=4.0,
                ),
            ),
            pretrained=Pretrained(denoiser=MODEL, text_encoders=MODEL, autoencoder=MODEL),
            objective=Denoising(times=LogitNormal()),
        ),
        data=DataConfig(
            source=ImageFolder(path="images"),
            transforms=Transforms(size=1024, crop="center", caption_dropout=0.1, buckets=Buckets()),
            cache=LatentOptions(views=1, text=True, batch_size=4),
            workers=4,
        ),
        tokenizer=TokenizerConfig(vocab_size=151_936, length=512),
        optimizer=AdamW(learning_rate=1e-5, schedule=ConstantLR(warmup_steps=500)),
        train=TrainConfig(steps=10_000, batch_size=64, compute="bfloat16", checkpoint_every=500),
        mesh=MeshConfig(fsdp=-1, data=1),
        slices=(
            PlannedTopology(topology="v5e:8x8", mesh=MeshConfig(data=1, fsdp=64)),
            PlannedTopology(
                topology="v5e:16x16", mesh=MeshConfig(data=4, fsdp=64), batch_size=256, remat="dots"
            ),
            PlannedTopology(topology="v6e:8x8", mesh=MeshConfig(data=1, fsdp=64), remat="dots"),
            PlannedTopology(topology="v5p:4x4x4", mesh=MeshConfig(data=1, fsdp=64), remat="none"),
            PlannedTopology(
                topology="h100:8", mesh=MeshConfig(data=1, fsdp=8), accumulate=2, remat="dots"
            ),
        ),
    )
