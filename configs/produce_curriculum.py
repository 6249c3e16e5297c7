"""The default recipe with the noise curriculum: at most 10 % noise first, then 20 %, ... 100 %.

Hardware: two CPU cores.
Cost: 7 minutes.

    python train.py configs/produce_curriculum.py

On two CPU cores it takes the 7 minutes of the default recipe. Over the last 150 of 800 steps
(`--train.steps 800 --task.curriculum.steps-per-level 40` against `configs/produce.py` with
`--train.steps 800`; AMD EPYC, Zen 4, 2026-11-28) the squared error in x0 is 0.051 against 0.065
where t is below 0.1, and 0.633 against 0.617 where it is above 0.9: detail comes sooner, heed of
the prompt later. After all steps 66.8 % of 500 held-out single objects are right, of the default
recipe 82.6 %; so this is for comparison, not for quality.
"""

import dataclasses
from pathlib import Path

from jaxdiff.diffusion.curriculum import NoiseCurriculum
from jaxdiff.training.recipe import Config, load_recipe


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
