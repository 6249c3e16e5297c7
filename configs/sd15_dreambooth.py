"""Stable Diffusion 1.5 personalised with a few photographs: DreamBooth with LoRA.

Hardware: one GPU.
Cost: not measured yet.

    python sample.py "a photo of a dog" --num-images 200 --out prior \\
        --model stable-diffusion-v1-5/stable-diffusion-v1-5 && rm prior/grid.png
    python train.py configs/sd15_dreambooth.py --data.source.own.path photos
    jaxdiff export runs/sd15_dreambooth dog --format lora

DreamBooth with prior preservation (Ruiz et al. 2023) on low-rank adapters: the caption of images in
`photos` is "a photo of sks dog" (`--data.source.own.prompt`), of those in `prior` "a photo of a
dog" (`--data.source.prior.prompt`), and batches contain equally many of both. Speed, memory and
quality have not been measured yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.sources.prior_preservation import PriorPreservation
from jaxdiff.evaluation.samples import SampleGrid
from jaxdiff.training.recipe import Config, load_recipe


def get_config() -> Config:
    """Return `configs/sd15_lora.py` on two folders, for few steps, without caption dropout."""
    base, replace = load_recipe(Path(__file__).with_name("sd15_lora.py")), dataclasses.replace
    source = PriorPreservation(
        own=ImageFolder(path="photos", prompt="a photo of sks dog"),
        prior=ImageFolder(path="prior", prompt="a photo of a dog"),
    )
    transforms = replace(base.data.transforms, caption_dropout=0.0)
    return replace(
        base,
        name="sd15_dreambooth",
        data=replace(base.data, source=source, transforms=transforms),
        train=replace(base.train, steps=800, batch_size=4),
        evaluators=(SampleGrid(prompts=("a photo of sks dog on a beach",), every=200),),
    )
