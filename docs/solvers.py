"""Plot docs/solvers.png: how close solvers come to the 1000-step solution in a few steps.

    pip install matplotlib && python docs/solvers.py

Each solver starts from the same noise and visits times that are uniform in log-SNR, without
guidance and with the model's own scale. The error is the root mean square of the difference to
the image of 1000 DDIM steps, with pixels in [0, 1], averaged over the prompts.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import jaxdiff
from jaxdiff import Sampler
from jaxdiff.diffusion.time_grids import LogSnrGrid
from jaxdiff.sampling.solvers import SOLVERS

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
SHOWN = ("ddim", "dpm++2m", "unipc")  # one evaluation of the network per step
REFERENCE_STEPS = 1000


def main():
    """Measure, print and plot."""
    pipe = jaxdiff.load("shipped:produce")
    grid = LogSnrGrid(schedule=pipe.spec.schedule)

    def generate(solver: str, num_steps: int, scale: float) -> np.ndarray:
        return pipe(
            PROMPTS,
            seeds=range(len(PROMPTS)),
            num_steps=num_steps,
            guidance_scale=scale,
            sampler=Sampler(solver=SOLVERS[solver](), grid=grid),
            output="float",
            batch_size=len(PROMPTS),
        )

    def rmse(images: np.ndarray, reference: np.ndarray) -> float:
        return float(np.mean(np.sqrt(np.mean((images - reference) ** 2, (1, 2, 3)))))

    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained", sharey=True)
    for axes, scale in zip(panels, (1.0, pipe.spec.sampler.resolve().guidance_scale), strict=True):
        reference = generate("ddim", REFERENCE_STEPS, scale)
        for solver in SHOWN:
            errors = [rmse(generate(solver, n, scale), reference) for n in STEPS]
            print(scale, solver, dict(zip(STEPS, np.round(errors, 4).tolist(), strict=True)))
            axes.loglog(STEPS, errors, "o-", label=solver, markersize=4)
        axes.set_title("without guidance" if scale == 1 else f"guidance {scale:g}")
        axes.set_xticks(STEPS, STEPS)
        axes.minorticks_off()
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"RMSE to {REFERENCE_STEPS} steps")
    panels[0].legend()
    figure.savefig(Path(__file__).with_name("solvers.png"), dpi=110)


if __name__ == "__main__":
    main()
