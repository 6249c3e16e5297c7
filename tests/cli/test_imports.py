"""What the commands import, in a process of its own."""

import subprocess
import sys

from jaxdiff.cli import main as cli

SCRIPT = """
import importlib, sys
for name in sys.argv[1].split(","):
    importlib.import_module(f"jaxdiff.cli.{name}")
for name in sys.argv[2].split(","):
    print(name) if name in sys.modules else None
from jaxdiff.training import tensorboard
from jaxdiff.io.imports import without_torch
for _ in range(2):
    with without_torch("transformers"):
        from transformers import AutoTokenizer
    print("transformers") if "transformers" in sys.modules else None
print("torch") if "torch" in sys.modules else None
import torch
assert torch.__file__.startswith(sys.argv[3])
"""
# Only where data are read, checkpoints read or written, metrics written, or objects detected.
LATER = (
    "torch scipy tensorflow_datasets grain orbax.checkpoint tensorboardX transformers "
    "jax.experimental.pallas"
)


def test_no_command_imports_what_it_may_not_need_and_nothing_imports_pytorch(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    arguments = [",".join(cli.COMMANDS), ",".join(LATER.split()), str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-c", path + SCRIPT, *arguments], capture_output=True, text=True
    )
    assert (run.stdout, run.returncode) == ("", 0), run.stderr
