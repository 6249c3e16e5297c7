"""`jaxdiff bench train|sample|data|checkpoint` and `jaxdiff bench compare`."""

import dataclasses
from types import ModuleType
from typing import Annotated, Literal

import tyro
from rich.console import Console

from jaxdiff.benchmark import checkpoint, data, sample, train
from jaxdiff.benchmark.report import Measured, compare, read_report, report, tell, write_report
from jaxdiff.cli.parsing import NO_PREFIX, parse, read_recipe
from jaxdiff.errors import UserError
from jaxdiff.training.recipe import Config

KINDS = ("train", "sample", "data", "checkpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measure a recipe. The recipe comes first, then keys of it to change, each with its value."""

    config: Annotated[Config, NO_PREFIX, tyro.conf.FlagConversionOff]
    json: str | None = None
    """File to write the report to."""
    warmup: int = 3
    """Repeats before those that count."""
    repeats: int = 20
    """Repeats that count."""
    real_data: bool = False
    """bench train: feed the step from the recipe's data instead of one random batch."""
    peak_tflops: float | None = None
    """bench train: peak TFLOP/s of one device, where the table of chips has no figure."""
    images: int | None = None
    """bench sample: images generated at a time; chosen for the device by default."""
    folder: str | None = None
    """bench checkpoint: where to write, local or gs://; a temporary folder by default."""
    against: Literal["torch"] | None = None
    """bench train: alternate the denoiser's step with the same step in PyTorch. bench data:
    alternate reading of JPEGs and of cached latents with torch's DataLoader."""


def measure_and_print(kind: str, options: BenchOptions) -> None:
    """Run one benchmark, print its figures, and write them to `--json`.

    Raises:
      UserError: numbers are out of range, or the benchmark refuses the recipe.
    """
    if options.repeats < 3 or options.warmup < 0:
        raise UserError(
            f"--repeats is {options.repeats} and --warmup {options.warmup}: expected at least 3 "
            "and at least 0."
        )
    if options.against and kind not in ("train", "data"):
        raise UserError(
            f"--against torch does not apply to bench {kind}: expected bench train or bench data."
        )
    with Console(stderr=True).status(f"bench {kind}: compiling, then timing"):
        found = _measure(kind, options)
    given = {
        f.name: getattr(options, f.name)
        for f in dataclasses.fields(options)
        if f.name not in ("config", "json")
    }
    result = report(kind, options.config, given, found)
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
    """Import the comparison only when it is asked for: PyTorch is an extra."""
    try:
        from jaxdiff.benchmark import torch_data, torch_peer
    except ImportError as error:
        raise UserError(
            f"--against torch needs PyTorch, which is not installed ({error}): pip install torch."
        ) from error
    return torch_peer if kind == "train" else torch_data


def bench_compare(before: str, after: str) -> None:
    """Run `jaxdiff bench compare A.json B.json`: print the differences larger than noise.

    Raises:
      UserError: a file is not a report, or the two are of different benchmarks.
    """
    print(compare(read_report(before), read_report(after)))


def bench_command(arguments: list[str]) -> None:
    """Run `jaxdiff bench train|sample|data|checkpoint [RECIPE] ...`, or `bench compare A B`."""
    kind, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if kind in ("-h", "--help"):
        print(f"usage: jaxdiff bench {{{','.join(KINDS)}}} [RECIPE] ...  (--help after each)")
        print("       jaxdiff bench compare BEFORE.json AFTER.json")
    elif kind == "compare":
        if len(rest) != 2:
            raise UserError(f"jaxdiff bench compare takes two reports: got {len(rest)} words.")
        bench_compare(*rest)
    elif kind in KINDS:
        config, rest = read_recipe(rest)
        default = BenchOptions(config=config)
        measure_and_print(kind, parse(BenchOptions, rest, prog="jaxdiff bench", default=default))
    else:
        raise UserError(
            f"There is no benchmark {kind!r}: there are {', '.join(KINDS)}, and compare."
        )
