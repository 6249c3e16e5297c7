"""The default recipe, trained for longer: the weights that ship with jaxdiff.

python train.py configs/produce_long.py
"""

import dataclasses
from pathlib import Path

from jaxdiff.config import Config, load_recipe
from jaxdiff.training.ema import Ema


def get_config() -> Config:
    """`configs/produce.py` with more steps and a longer average."""
    base = load_recipe(Path(__file__).with_name("produce.py"))
    return dataclasses.replace(
        base,
        name="produce_long",
        ema=Ema(decay=0.999),
        train=dataclasses.replace(base.train, steps=6500, checkpoint_every=500),
        eval_samples=500,
    )
