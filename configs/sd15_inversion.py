"""A new word for Stable Diffusion 1.5, from a few photographs: textual inversion.

Hardware: one GPU.
Cost: not measured yet.

    python train.py configs/sd15_inversion.py --data.source.path photos
    jaxdiff export runs/sd15_inversion words --format embedding
    python sample.py "<my-thing> on a beach" --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --embedding words

Only the embedding of `<my-thing>` (`--task.trainable.inversion.word`) is trained, initialised from
that of "thing" (`--task.trainable.inversion.initial`; give its class, such as "dog"). Photographs
need no captions. The second command writes it for diffusers' `load_textual_inversion`. Speed,
memory and quality have not been measured yet.
"""

import dataclasses
from pathlib import Path

from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.evaluation.samples import SampleGrid
from jaxdiff.training.recipe import Config, load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, TextualInversion, Trainable


def get_config() -> Config:
    """Return `configs/sd15.py` with a new word and a learning rate for its embedding."""
    base, replace = load_recipe(Path(__file__).with_name("sd15.py")), dataclasses.replace
    assert isinstance(base.task, DiffusionTask)
    transforms = replace(base.data.transforms, crop="random", flip=True, caption_dropout=0.0)
    source = ImageFolder(path="photos", prompt="a photo of <my-thing>")
    return replace(
        base,
        name="sd15_inversion",
        task=replace(base.task, trainable=Trainable(denoiser=False, inversion=TextualInversion())),
        data=replace(base.data, source=source, transforms=transforms),
        optimizer=replace(base.optimizer, learning_rate=2e-3),
        train=replace(base.train, steps=3000, batch_size=4),
        evaluators=(SampleGrid(prompts=("a photo of <my-thing> on a beach",), every=500),),
    )
