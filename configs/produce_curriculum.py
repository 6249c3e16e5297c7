"""The default recipe with the noise curriculum: at most 10 % noise first, then 20 %, ... 100 %.

Hardware: two CPU cores.
Cost: 7 minutes.

    python train.py configs/produce_curriculum.py

This recipe is for comparison: after all steps 66.8 % of 500 held-out single objects are right, and
82.6 % with the default recipe. Detail appears sooner and prompt adherence later: over the last 150
of 800 steps (`--train.steps 800 --task.curriculum.steps-per-level 40`; AMD EPYC, Zen 4, 2026-11-28)
the squared error in x0 is 0.051 for t < 0.1 and 0.633 for t > 0.9, and 0.065 and 0.617 with the
default recipe.
"""

import dataclasses
from pathlib import Path

from jaxdiff.diffusion.curriculum import NoiseCurriculum
from jaxdiff.training.recipe import Config, load_recipe


def get_config() -> Config:
    """Return `configs/produce.py` with the curriculum over the first half of its steps."""
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
