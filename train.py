"""Train a recipe: `python train.py [configs/NAME.py] [--path.to.key VALUE ...] [--out DIR]`."""

import sys

from jaxdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
