"""Time the denoiser's training step beside the same step in PyTorch, eager and compiled.

    pip install torch==2.13.0 && pip install -e '.[parity]'
    python -m benchmarks.train_against_torch configs/dit_xl2_imagenet256.py --repeats 20

Takes `--warmup`, `--repeats`, `--json FILE` and the recipe's keys, as `jaxdiff bench train` does.
"""

import sys

from benchmarks import torch_baseline
from benchmarks.command import run

if __name__ == "__main__":
    sys.exit(run("train_against_torch", torch_baseline.measure))
