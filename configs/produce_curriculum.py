"""The default recipe with the noise curriculum: at most 10 % noise first, then 20 %, ... 100 %.

python train.py configs/produce_curriculum.py
"""

import dataclasses
from pathlib import Path

from jaxdiff.config import Config, load_recipe
from jaxdiff.diffusion.curriculum import NoiseCurriculum


def get_config() -> Config:
    """`configs/produce.py`, half of whose steps climb the levels and half see them all."""
    base = load_recipe(Path(__file__).with_name("produce.py"))
    levels = 10
    steps_per_level = base.train.steps // (2 * levels)
    return dataclasses.replace(
        base,
        name="produce_curriculum",
        task=dataclasses.replace(
            base.task,
            curriculum=NoiseCurriculum(levels=levels, steps_per_level=steps_per_level),
        ),
    )
