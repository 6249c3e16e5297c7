"""The recipe of a run: model and task, data, optimizer, mesh and schedule."""

import importlib.util
import os
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Seed
from jaxdiff.config.plugins import failure_of
from jaxdiff.config.recipe_files import find_recipe
from jaxdiff.config.serialization import flatten, from_json, to_json
from jaxdiff.data.loader import DataConfig
from jaxdiff.datasets.icons.emoji_scenes import EmojiScenes
from jaxdiff.datasets.icons.source import Iconify
from jaxdiff.datasets.openmoji.source import OpenMoji
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.distributed.mesh import MeshConfig, parse_slices
from jaxdiff.distributed.sharding import Reduction
from jaxdiff.distributed.xla_flags import CompilerConfig
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluators import AnyEvaluator
from jaxdiff.models.layers import ComputeType, Remat
from jaxdiff.training.best import BestCheckpoint
from jaxdiff.training.ema import Ema
from jaxdiff.training.optimizer import AdamW, Muon
from jaxdiff.training.tasks.autoencoder import AutoencoderTask
from jaxdiff.training.tasks.base import Task
from jaxdiff.training.tasks.clip import ClipTask
from jaxdiff.training.tasks.diffusion import DiffusionTask

AnyTask = DiffusionTask | AutoencoderTask | ClipTask | Task


@checked
@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Tokenizer of text encoders that are not pretrained; pretrained ones bring their own.

    Attributes:
      path: a Hugging Face tokenizer folder; None trains a CLIP tokenizer on the captions.
      vocab_size: upper bound of the vocabulary of a trained tokenizer.
      length: number of tokens of a prompt, start and end included; longer prompts are truncated.
      records: number of records whose captions train it.
    """

    path: str | None = None
    vocab_size: Count = 1024
    length: Count = 32
    records: Count = 10_000


@checked
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision and intervals of a run.

    Attributes:
      steps: number of training steps.
      batch_size: number of images of a step, over all devices and micro-batches.
      accumulate: number of sequential micro-batches of a step's batch.
      compute: type of activations and products; parameters stay float32.
      reduce: type in which replicas of the model (`mesh.data`, `mesh.slices`) sum gradients: that
        of `compute`, during the backward pass, or float32, after it. Gradients of micro-batches
        are summed in float32.
      seed: seed of initialisation, data order and noise.
      log_every: steps between lines of metrics.
      checkpoint_every: steps between checkpoints; the last step always has one.
      keep: number of newest checkpoints that are kept.
      max_nonfinite: consecutive updates with a nonfinite loss or gradient that end the run.
      wandb: whether metrics also go to Weights & Biases.
      evaluate: whether the recipe's evaluators run.
      profile_at: number of the first step of a trace for xprof; None writes no trace.
      profile_steps: number of steps that are traced.

    Raises:
      UserError: a number that must be positive is not.
    """

    steps: Count = 10_000
    batch_size: Count = 64
    accumulate: Count = 1
    compute: ComputeType = "float32"
    reduce: Reduction = "compute"
    seed: Seed = 0
    log_every: Count = 50
    checkpoint_every: Count = 1000
    keep: Count = 2
    max_nonfinite: Count = 20
    wandb: bool = False
    evaluate: bool = True
    profile_at: Count | None = None
    profile_steps: Count = 3


@checked
@dataclass(frozen=True, kw_only=True)
class PlannedTopology:
    """Hardware that a recipe is planned for, and the settings for it.

    Attributes:
      topology: name of the hardware, as in `--topology` of `jaxdiff plan` and `jaxdiff train`.
      mesh: mesh of its devices.
      accumulate: micro-batches per step; more than 1 where a whole batch does not fit.
      batch_size: images per step; None leaves the recipe's.
      remat: what the denoiser keeps for the backward pass; None leaves the recipe's.
    """

    topology: str
    mesh: MeshConfig
    accumulate: Count = 1
    batch_size: Count | None = None
    remat: Remat | None = None


@checked
@dataclass(frozen=True, kw_only=True)
class Config:
    """A recipe: the model and its task, data, optimizer, mesh, and what is logged.

    Attributes:
      name: name of the run, whose folder is `runs/NAME` by default.
      task: the model, its loss, and the parameters that are trained.
      data: training records and their transforms.
      tokenizer: tokenizer of text encoders that are not pretrained.
      optimizer: the optimizer, with its learning-rate schedule.
      ema: the moving average of the parameters, which is sampled and exported.
      train: length, batch, precision and intervals.
      mesh: mesh of the devices.
      compiler: flags of XLA.
      evaluators: metrics and images, at intervals and at the end.
      best: the evaluator's scalar whose best step is kept, and when training stops early.
      slices: settings for topologies, which `--topology` of `jaxdiff plan` and `train` chooses.

    Raises:
      UserError: the data have more reference images than the model reads.
    """

    name: str
    task: AnyTask
    data: DataConfig
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: AdamW | Muon = field(default_factory=AdamW)
    ema: Ema = field(default_factory=Ema)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compiler: CompilerConfig = field(default_factory=CompilerConfig)
    evaluators: tuple[AnyEvaluator, ...] = ()
    best: BestCheckpoint | None = None
    slices: tuple[PlannedTopology, ...] = ()

    def __post_init__(self):
        wanted, most = self.data.transforms.references, 0
        if isinstance(self.task, DiffusionTask):
            most = self.task.model.denoiser.max_references
        if wanted > most:
            raise UserError(
                f"data.transforms.references is {wanted} but the model reads {most or 'no'} "
                f"reference images: expected at most {most}; lower it, or train a model that reads "
                "them, such as FLUX.2 klein (up to 4)."
            )


def on_topology(config: Config, name: str) -> Config:
    """Return a recipe with its own settings for a topology, if it names any.

    Each of several slices, such as those of 2xv5e:16x16, has the settings for one.
    """
    count, single = parse_slices(name)
    planned = next((planned for planned in config.slices if planned.topology == single), None)
    if planned is not None:
        batch_size = planned.batch_size or config.train.batch_size
        train = replace(config.train, accumulate=planned.accumulate, batch_size=batch_size)
        config = replace(config, mesh=planned.mesh, train=train)
        config = with_remat(config, planned.remat) if planned.remat else config
    return replace(config, mesh=replace(config.mesh, slices=count)) if count > 1 else config


def with_remat(config: Config, remat: Remat) -> Config:
    """Return a recipe with another remat policy of its denoiser."""
    assert isinstance(config.task, DiffusionTask)
    model = config.task.model
    denoiser: Any = replace(model.denoiser, remat=remat)
    return replace(config, task=replace(config.task, model=replace(model, denoiser=denoiser)))


DATASETS = (Produce, OpenMoji, Iconify, EmojiScenes)
"""Sources that ship with jaxdiff, beside those of `jaxdiff.data`."""


def config_from_json(data: Any, types: Sequence[type] = ()) -> Config:
    """Return the recipe that `to_json` wrote; `types` are further dataclasses to accept.

    Raises:
      UserError: it is not a recipe of this version.
    """
    return from_json(Config, data, types=(*DATASETS, *types))


def differences(ours: Config, theirs: Config) -> list[str]:
    """Return `key is A here and B there` for each key in which two recipes differ."""
    a, b = flatten(to_json(ours)), flatten(to_json(theirs))
    return [
        f"{key} is {a.get(key, '(none)')!r} here and {b.get(key, '(none)')!r} there"
        for key in dict.fromkeys([*a, *b])
        if a.get(key, "(none)") != b.get(key, "(none)")
    ]


def load_recipe(path: str | os.PathLike[str]) -> Config:
    """Return the `Config` that a recipe's `get_config()` returns.

    A recipe may import the modules in its own folder, as a script does.

    Raises:
      UserError: there is no such recipe (`find_recipe`), it is not Python, it fails, or it defines
        no `get_config` that returns a `Config`.
    """
    path = find_recipe(path)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a recipe: expected a Python file; see configs/.")
    try:
        compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(f"{path} is not Python in UTF-8 ({reason}{line}): correct it.") from error
    module = importlib.util.module_from_spec(spec)
    if (folder := str(path.parent.absolute())) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = get_config() if callable(get_config) else None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise failure_of(str(path), error) from error
    if not callable(get_config):
        raise UserError(f"{path} defines no get_config(): expected one that returns a Config.")
    if not isinstance(config, Config):
        raise UserError(
            f"get_config() of {path} returned {reprlib.repr(config)}: expected a Config."
        )
    return config
