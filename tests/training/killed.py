"""Train a recipe that is killed in step 5: step 4 is saved and the save of step 6 not begun.

    python tests/training/killed.py RECIPE --out FOLDER

The recipe has an evaluator that is due after each step, in whose place the process kills itself.
"""

import os
import pathlib
import signal
import sys
import time

from jaxdiff.evaluation.evaluator import Report
from jaxdiff.training.loop import train
from jaxdiff.training.recipe import load_recipe


def main() -> None:
    recipe, _, out = sys.argv[1:]

    def evaluate(state, *_):
        if int(state.step) == 5:
            while not (pathlib.Path(out) / "checkpoints" / "4").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return Report()

    train(load_recipe(recipe), out, evaluate=evaluate)


if __name__ == "__main__":
    main()
