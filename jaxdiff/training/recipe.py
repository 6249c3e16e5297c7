"""The recipe of a run: frozen dataclasses, as JSON and back, and the differences of two of them.

Every value in a recipe is a typed object. JSON holds {"type": class name, ...} where a field may be
one of several classes; the field's own annotation says which, so nothing is looked up by name
anywhere else.
"""

import dataclasses
import difflib
import importlib.util
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxdiff.data.loader import DataConfig
from jaxdiff.distributed.mesh import MeshConfig, Slice
from jaxdiff.distributed.xla_flags import CompilerConfig
from jaxdiff.errors import UserError
from jaxdiff.sampling.sampler import SamplingConfig
from jaxdiff.training.ema import Ema
from jaxdiff.training.optimizer import AdamW, Muon
from jaxdiff.training.step import ComputeType
from jaxdiff.training.tasks.autoencoder import AutoencoderTask
from jaxdiff.training.tasks.clip import ClipTask
from jaxdiff.training.tasks.diffusion import DiffusionTask

RECIPES = Path(__file__).parent.parent.parent / "configs"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """CLIP's tokenizer, read from a folder or trained on the captions.

    A recipe that takes its text encoder from elsewhere takes the tokenizer from there too.

    Attributes:
      path: a Hugging Face tokenizer folder; None trains one on the run's own captions.
      vocab_size: of a trained one, at most.
      length: tokens of a prompt, start and end included; longer prompts are truncated.
      records: how many records a trained one reads its captions from.
    """

    path: str | None = None
    vocab_size: int = 1024
    length: int = 32
    records: int = 10_000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at a time, and how often what is written.

    Attributes:
      steps: of the run.
      batch_size: images of one step, over all devices and micro-batches.
      accumulate: micro-batches that a step's batch is split into, one after the other.
      compute: type of activations and products; parameters stay float32.
      seed: of initialisation, data order and noise.
      log_every: steps from one line of metrics to the next.
      checkpoint_every: steps from one checkpoint to the next; the last step always has one.
      keep: newest checkpoints that are kept.
      sample_every: steps from one grid of samples to the next; 0 for none but the last.
      max_nonfinite: updates skipped in a row, for a loss or gradient that is not finite, after
        which the run stops.
      wandb: also log to Weights & Biases.
    """

    steps: int = 10_000
    batch_size: int = 64
    accumulate: int = 1
    compute: ComputeType = "float32"
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    keep: int = 2
    sample_every: int = 0
    max_nonfinite: int = 20
    wandb: bool = False

    def __post_init__(self):
        positive = ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep")
        for name in (*positive, "max_nonfinite"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"train.{name} is {getattr(self, name)}: expected a positive number."
                )
        if self.seed < 0:
            raise UserError(f"train.seed is {self.seed}: expected 0 or a positive number.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A recipe: what is trained, on what, how, on which mesh, and how it is then looked at.

    Attributes:
      name: of the run; its folder is `runs/NAME` unless told otherwise.
      slices: hardware that `jaxdiff plan` plans it for, and the mesh to give it there.
      eval_samples: prompts of each kind that the trained model is scored on at the end; 0 for none.
    """

    name: str
    task: DiffusionTask | AutoencoderTask | ClipTask
    data: DataConfig
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: AdamW | Muon = field(default_factory=AdamW)
    ema: Ema = field(default_factory=Ema)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compiler: CompilerConfig = field(default_factory=CompilerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    slices: tuple[Slice, ...] = ()
    eval_samples: int = 0


def differences(ours: Config, theirs: Config) -> list[str]:
    """`key: ours, theirs` for each key in which two recipes differ."""
    a, b = flatten(to_json(ours)), flatten(to_json(theirs))
    missing: Literal["(none)"] = "(none)"
    keys = list(dict.fromkeys([*a, *b]))
    return [
        f"{key} is {a.get(key, missing)!r} here and {b.get(key, missing)!r} there"
        for key in keys
        if a.get(key, missing) != b.get(key, missing)
    ]


def load_recipe(path: str | os.PathLike[str]) -> Config:
    """The `Config` that a recipe's `get_config()` returns.

    Raises:
      UserError: no such file, or no `get_config` in it.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(p.name for p in RECIPES.glob("*.py"))
        nearest = difflib.get_close_matches(f"{path.stem}.py", there, n=1)
        hint = f"did you mean configs/{nearest[0]}?" if nearest else "see those in configs/."
        raise UserError(f"There is no recipe {path}: {hint}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no recipe: expected a Python file; see configs/.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} defines no get_config(): a recipe returns its Config from it.")
    return module.get_config()
