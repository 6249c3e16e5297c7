"""`jaxdiff bench train|sample|data|checkpoint` and `jaxdiff bench compare`."""

import dataclasses
from types import ModuleType
from typing import Annotated, Literal

import tyro
from rich.console import Console

from jaxdiff.benchmark import checkpoint, data, sample, train
from jaxdiff.benchmark.report import Measured, compare, read_report, report, tell, write_report
from jaxdiff.errors import UserError
from jaxdiff.training.recipe import Config

KINDS = ("train", "sample", "data", "checkpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Times a recipe: its file first, then keys of it to change, each followed by its value."""

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    json: str | None = None
    """File to write the report to."""
    warmup: int = 3
    """Repeats before those that count."""
    repeats: int = 20
    """Repeats that count."""
    real_data: bool = False
    """bench train: feed the step from the recipe's data; by default one random batch serves all."""
    peak_tflops: float | None = None
    """bench train: what one device can do, in TFLOP/s, where the table of chips has no figure."""
    images: int | None = None
    """bench sample: images drawn at a time; chosen for the device by default."""
    folder: str | None = None
    """bench checkpoint: where to write, local or gs://; a temporary folder by default."""
    against: Literal["torch"] | None = None
    """bench train: time the denoiser's step beside the same in PyTorch, in turn. bench data: read
    JPEGs, and cached latents, beside torch's DataLoader, in batches of the recipe's size."""


def measure_and_tell(kind: str, options: BenchOptions) -> None:
    """Times one thing, prints the figures, and writes them where `--json` says.

    Raises:
      UserError: numbers out of range, or what the thing itself raises.
    """
    if options.repeats < 3 or options.warmup < 0:
        raise UserError(
            f"--repeats is {options.repeats} and --warmup {options.warmup}: expected at least 3, "
            "and 0 or more."
        )
    if options.against and kind not in ("train", "data"):
        raise UserError(
            f"--against torch is of bench train and data: bench {kind} has nothing beside it."
        )
    with Console(stderr=True).status(f"bench {kind}: compiling, then timing"):
        found = _measure(kind, options)
    told = {
        f.name: getattr(options, f.name)
        for f in dataclasses.fields(options)
        if f.name not in ("config", "json")
    }
    result = report(kind, options.config, told, found)
    print(tell(result))
    if options.json:
        write_report(options.json, result)
        print(f"Wrote {options.json}")


def _measure(kind: str, options: BenchOptions) -> list[Measured]:
    config, turns = options.config, {"warmup": options.warmup, "repeats": options.repeats}
    match kind:
        case "train" | "data" if options.against:
            return _beside_torch(kind).measure(config, **turns)
        case "train":
            peak = options.peak_tflops
            return [train.measure(config, real=options.real_data, peak_tflops=peak, **turns)]
        case "sample":
            return [sample.measure(config, batch_size=options.images, **turns)]
        case "data":
            return [data.measure(config, **turns)]
    return [checkpoint.measure(config, folder=options.folder, **turns)]


def _beside_torch(kind: str) -> ModuleType:
    """Loaded here alone: PyTorch is an extra that other benchmarks do without."""
    try:
        from jaxdiff.benchmark import torch_data, torch_peer
    except ImportError as error:
        raise UserError(
            f"--against torch needs PyTorch, which is not there ({error}): install jaxdiff[parity]."
        ) from error
    return torch_peer if kind == "train" else torch_data


def bench_compare(before: str, after: str) -> None:
    """`jaxdiff bench compare A.json B.json`: prints what moved beyond noise.

    Raises:
      UserError: a file is no report, or the two are not of the same benchmark.
    """
    print(compare(read_report(before), read_report(after)))
