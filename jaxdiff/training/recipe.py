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
from typing import Any, Literal

from jaxdiff.config.recipe_files import find_recipe
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


def to_json(value: Any) -> Any:
    """Dataclasses as dicts that say their type; tuples as lists; everything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def from_json(annotation: Any, data: Any, path: str = "config") -> Any:
    """The value that `to_json` wrote, given the type that is expected there.

    Raises:
      UserError: for a type, a key or a value that is not expected, naming the nearest that is.
    """
    candidates = members(annotation)
    if isinstance(data, dict):
        return _object_from_json(candidates, data, path)
    tuples = [c for c in candidates if typing.get_origin(c) is tuple]
    if isinstance(data, list) and tuples:
        inner = typing.get_args(tuples[0])
        kinds = [inner[0]] * len(data) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) == len(data):
            pairs = enumerate(zip(kinds, data, strict=True))
            return tuple(from_json(kind, value, f"{path}[{i}]") for i, (kind, value) in pairs)
    if type(data) is int and float in candidates and int not in candidates:
        return float(data)
    if not any(_fits(data, candidate) for candidate in candidates):
        raise UserError(
            f"{path} is {data!r}: expected {' or '.join(_name(c) for c in candidates)}; {_FOREIGN}"
        )
    return data


_FOREIGN = "the file was written by another version of jaxdiff or edited by hand."


def _object_from_json(candidates: list[Any], data: dict[str, Any], path: str) -> Any:
    """The dataclass, one of the candidates, that a JSON object states."""
    classes: dict[str, Any] = {_name(c): c for c in candidates if dataclasses.is_dataclass(c)}
    if data.get("type") not in classes:
        raise UserError(
            f"{path} is of type {data.get('type')}: expected "
            f"{' or '.join(classes) or 'a value'}; {_FOREIGN}"
        )
    cls = classes[data["type"]]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {name: value for name, value in data.items() if name != "type"}
    for name in given:
        if name not in fields:
            raise unknown_key(f"{path}.{name}", [f"{path}.{k}" for k in fields])
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise UserError(f"{path}.{name} is missing: {_FOREIGN}")
    return cls(**{k: from_json(hints[k], value, f"{path}.{k}") for k, value in given.items()})


def _fits(data: Any, candidate: Any) -> bool:
    """Whether a JSON value that is no object and no list is of this type."""
    if typing.get_origin(candidate) is Literal:
        return data in typing.get_args(candidate)
    return type(data) is candidate


def _name(candidate: Any) -> str:
    if typing.get_origin(candidate) is Literal:
        return " or ".join(repr(value) for value in typing.get_args(candidate))
    return "null" if candidate is type(None) else getattr(candidate, "__name__", str(candidate))


def members(annotation: Any) -> list[Any]:
    """The types that a field may hold: of a union its members, else itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in members(a)]
    return [annotation]


def unknown_key(key: str, known: list[str]) -> UserError:
    """The error for a key that no recipe has, with the nearest one that it has."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(known)}."
    return UserError(f"{key} is not a key of this recipe: {hint}")


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """`{"train.steps": 10, ...}` of what `to_json` returned."""
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for name, inner in value.items():
            flat |= flatten(inner, f"{path}.{name}" if path else name)
        return flat
    return {path: value}


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
    """Return the `Config` that a recipe's `get_config()` returns.

    Args:
      path: of a Python file, or the name of a shipped recipe (`find_recipe`).

    Raises:
      UserError: no such recipe, or no `get_config` in it.
    """
    path = find_recipe(path)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no recipe: expected a Python file; see configs/.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} defines no get_config(): a recipe returns its Config from it.")
    return module.get_config()
