"""Time the input pipeline beside torch's DataLoader, on JPEGs and on cached latents.

    pip install torch==2.13.0 && pip install -e '.[parity]'
    python -m benchmarks.data_against_torch configs/produce.py --train.batch-size 64

Takes `--warmup`, `--repeats`, `--json FILE` and the recipe's keys, as `jaxdiff bench data` does.
"""

import sys

from benchmarks import torch_data
from benchmarks.command import run

if __name__ == "__main__":
    sys.exit(run("data_against_torch", torch_data.measure))
