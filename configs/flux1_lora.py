"""FLUX.1-dev with low-rank adapters, trained on your own images.

Hardware: one GPU of 40 GB, TPU v5e:8x8, v5e:16x16, v6e:8x8, v5p:4x4x4 or 8 H100.
Cost: planned: 1.0, 1.0, 0.23, 0.45 or 1.7 hours on slices at 40 % utilisation; not trained yet.

    python train.py configs/flux1_lora.py --data.source.path photos
    jaxdiff export runs/flux1_lora style --format lora

The weights come from the hub, where dev's licence, which is not a commercial one, is to be accepted
first. Only adapters are trained, of all projections of attention and MLPs
(`--task.trainable.lora.rank`). The frozen transformer takes 24 GB in bfloat16. The guidance that it
reads is 1, as in diffusers' training script; times are logit-normal, shifted by the number of
tokens. A cached caption takes 4.2 MB. Speed, memory and quality have not been measured yet.

`jaxdiff plan configs/flux1_lora.py --quick` compiles the step for each of them:

    slice      batch  mesh            micro-batches  remat  state/chip  memory/chip  hours at 40 %
    v5e:8x8       64  data=1 fsdp=64              1  full     0.37 GiB    4.3 of 16            1.0
    v5e:16x16    256  data=4 fsdp=64              1  full     0.37 GiB    4.0 of 16            1.0
    v6e:8x8       64  data=1 fsdp=64              1  full     0.37 GiB    4.4 of 32           0.23
    v5p:4x4x4     64  data=64 fsdp=1              1  dots    23.30 GiB   57.2 of 95           0.45
    h100:8        64  data=8 fsdp=1               8  dots    23.30 GiB   57.6 of 80            1.7

State is weights, EMA, moments and frozen parts; memory is that of the whole step in GiB. Hours are
those of 2,000 steps at 40 % of the chips' peak FLOP/s. On one device the batch is 4.
"""

import dataclasses
from pathlib import Path

from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.time_grids import FlowGrid
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.diffusion.time_shifts import TokenShift
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.models.conditioners.flux1 import Flux1Conditioner
from jaxdiff.models.conditioning import ClipTextEncoder
from jaxdiff.models.text_encoders.t5 import T5Config, T5TextEncoder
from jaxdiff.pretrained.presets import CLIP_L, FLUX1_AUTOENCODER, FLUX1_DEV
from jaxdiff.training.recipe import Config, PlannedTopology, TokenizerConfig, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained

MODEL = "black-forest-labs/FLUX.1-dev"


def get_config() -> Config:
    """Return `configs/flux2_klein_4b_lora.py` with the networks and times of FLUX.1."""
    base = load_recipe(Path(__file__).with_name("flux2_klein_4b_lora.py"))
    replace = dataclasses.replace
    assert isinstance(base.task, DiffusionTask)
    model, shift = base.task.model, TokenShift()
    return replace(
        base,
        name="flux1_lora",
        task=replace(
            base.task,
            model=replace(
                model,
                name="flux1",
                denoiser=replace(FLUX1_DEV, remat="full"),
                conditioner=Flux1Conditioner(
                    text=ClipTextEncoder(model=CLIP_L), text_2=T5TextEncoder(model=T5Config())
                ),
                autoencoder=FLUX1_AUTOENCODER,
                sampler=replace(
                    model.sampler,
                    grid=FlowGrid(token_shift=shift),
                    num_steps=28,
                    guidance_scale=3.5,
                ),
            ),
            pretrained=Pretrained(denoiser=MODEL, text_encoders=MODEL, autoencoder=MODEL),
            objective=Denoising(times=LogitNormal(token_shift=shift)),
        ),
        slices=(
            PlannedTopology(topology="v5e:8x8", mesh=MeshConfig(data=1, fsdp=64), batch_size=64),
            PlannedTopology(topology="v5e:16x16", mesh=MeshConfig(data=4, fsdp=64), batch_size=256),
            PlannedTopology(topology="v6e:8x8", mesh=MeshConfig(data=1, fsdp=64), batch_size=64),
            PlannedTopology(
                topology="v5p:4x4x4", mesh=MeshConfig(data=64, fsdp=1), batch_size=64, remat="dots"
            ),
            PlannedTopology(
                topology="h100:8",
                mesh=MeshConfig(data=8, fsdp=1),
                accumulate=8,
                batch_size=64,
                remat="dots",
            ),
        ),
        tokenizer=TokenizerConfig(vocab_size=32_128, length=77),
    )
