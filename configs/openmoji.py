"""Real drawings: 3,903 emoji of OpenMoji, some combinations of people at work held out.

    pip install -e '.[openmoji]' && python train.py configs/openmoji.py
    jaxdiff evaluate runs/openmoji

A score is the share of held-out combinations (profession, gender, skin tone) whose nearest real
drawing, among all of that profession, is the prompted one. Sized for one GPU; it has not been
trained to the end yet, so no figure is stated.
"""

import dataclasses
from pathlib import Path

from jaxdiff.config import Config, load_recipe
from jaxdiff.data.openmoji import OpenMoji
from jaxdiff.models.clip import ClipTextConfig
from jaxdiff.models.unet import UNetConfig
from jaxdiff.training.diffusion import DiffusionTask, TextTower

PROMPTS = (
    "a woman firefighter with dark skin",
    "a man cook with light skin",
    "a person astronaut with medium skin",
    "a red apple",
    "a cat face",
    "a flag of Japan",
)


def get_config() -> Config:
    """`configs/produce.py` on OpenMoji, larger and longer."""
    base = load_recipe(Path(__file__).with_name("produce.py"))
    assert isinstance(base.task, DiffusionTask)
    task = dataclasses.replace(
        base.task,
        denoiser=UNetConfig(widths=(128, 192, 256), blocks=2, text_width=256, pooled_width=256),
        # As drawn: what tells the drawings apart are the words, which layer 0 leaves as they are.
        text=TextTower(
            model=ClipTextConfig(vocab_size=2048, length=32, width=256, depth=2, heads=4),
            trained=False,
            layer=0,
        ),
    )
    return dataclasses.replace(
        base,
        name="openmoji",
        task=task,
        data=dataclasses.replace(base.data, source=OpenMoji()),
        tokenizer=dataclasses.replace(base.tokenizer, vocab_size=2048, length=32, records=4000),
        train=dataclasses.replace(
            base.train, steps=40_000, batch_size=128, checkpoint_every=2000, compute="bfloat16"
        ),
        sampling=dataclasses.replace(base.sampling, prompts=PROMPTS),
    )
