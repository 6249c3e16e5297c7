"""Draws docs/solvers.png: how near solvers come to the 1000-step solution in a few steps.

    pip install matplotlib && python docs/solvers.py

From the same noise, with the weights that ship with jaxdiff, without guidance and with the model's
own, at times even in log-SNR: the root mean square of the difference to the image of 1000 steps of
DDIM, in pixels from 0 to 1, mean over the prompts.
"""

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import jaxdiff
from jaxdiff.diffusion.time_grids import LogSnrGrid
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.sampling.sampler import SOLVERS

PROMPTS = [
    "a small green pea",
    "a large ripe tomato with a stem",
    "a blue banana",
    "a large yellow lemon",
    "a purple aubergine on the left",
    "an orange carrot left of a green pepper",
    "a small red pepper with a stem",
    "a yellow banana above a red tomato",
]
STEPS = (5, 10, 15, 20, 30, 50)
SHOWN = ("ddim", "dpm++2m", "unipc")  # which call the network once in a step
FINEST = 1000


def main():
    """Measures, prints and draws."""
    shipped = jaxdiff.load()
    grid = LogSnrGrid(schedule=shipped.task.objective.schedule)
    sampling = dataclasses.replace(shipped.config.sampling, grid=grid)
    config = dataclasses.replace(shipped.config, sampling=sampling)
    pipeline = Pipeline(shipped.bundle._replace(config=config))

    def draw(solver, num_steps, scale):
        return pipeline(
            PROMPTS,
            seeds=range(len(PROMPTS)),
            solver=SOLVERS[solver](),
            num_steps=num_steps,
            guidance_scale=scale,
            output="float",
            batch_size=len(PROMPTS),
        )

    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained", sharey=True)
    for axes, scale in zip(panels, (1.0, shipped.config.sampling.guidance_scale), strict=True):
        finest = draw("ddim", FINEST, scale)
        for solver in SHOWN:
            apart = [
                float(np.mean(np.sqrt(np.mean((draw(solver, n, scale) - finest) ** 2, (1, 2, 3)))))
                for n in STEPS
            ]
            print(scale, solver, {n: round(x, 4) for n, x in zip(STEPS, apart, strict=True)})
            axes.loglog(STEPS, apart, "o-", label=solver, markersize=4)
        axes.set_title("without guidance" if scale == 1 else f"guidance {scale:g}")
        axes.set_xticks(STEPS, STEPS)
        axes.minorticks_off()
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"RMSE to {FINEST} steps")
    panels[0].legend()
    figure.savefig(Path(__file__).with_name("solvers.png"), dpi=110)


if __name__ == "__main__":
    main()
