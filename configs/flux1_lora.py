"""FLUX.1-dev with low-rank adapters, trained on your own images.

Hardware: GPU of 40 GB or a TPU slice.
Cost: not measured yet.

    python train.py configs/flux1_lora.py --data.source.path photos
    jaxdiff export runs/flux1_lora style --format lora

The weights come from the hub, where dev's licence, which is not a commercial one, is to be accepted
first. Only adapters are trained, of all projections of attention and MLPs
(`--task.trainable.lora.rank`). The frozen transformer takes 24 GB in bfloat16. The guidance that it
reads is 1, as in diffusers' training script; times are logit-normal, shifted by the number of
tokens. A cached caption takes 4.2 MB. Speed, memory and quality have not been measured yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.time_grids import FlowGrid
from jaxdiff.diffusion.time_sampling import LogitNormal
from jaxdiff.diffusion.time_shifts import TokenShift
from jaxdiff.models.conditioners.flux1 import Flux1Conditioner
from jaxdiff.models.conditioning import ClipTextEncoder
from jaxdiff.models.text_encoders.t5 import T5Config, T5TextEncoder
from jaxdiff.pretrained.presets import CLIP_L, FLUX1_AUTOENCODER, FLUX1_DEV
from jaxdiff.training.recipe import Config, TokenizerConfig, load_recipe
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
        tokenizer=TokenizerConfig(vocab_size=32_128, length=77),
    )
