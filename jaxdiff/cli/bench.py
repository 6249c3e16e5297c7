"""`jaxdiff bench train|sample|data|checkpoint` and `jaxdiff bench compare`."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import tyro
from etils import epath

from jaxdiff.benchmark.checkpoint import time_checkpoints
from jaxdiff.benchmark.data import time_batches
from jaxdiff.benchmark.report import (
    Measurement,
    compare,
    format_report,
    make_report,
    read_report,
    write_report,
)
from jaxdiff.benchmark.sample import time_sampling
from jaxdiff.benchmark.train import time_training
from jaxdiff.cli.parsing import NO_PREFIX
from jaxdiff.cli.recipe_flags import parse_recipe_flags
from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Natural, Positive, Range
from jaxdiff.errors import UserError
from jaxdiff.io.files import make_folder
from jaxdiff.io.terminal import console, write_line, write_text
from jaxdiff.io.text import check_text
from jaxdiff.training.recipe import Config

KINDS = ("train", "sample", "data", "checkpoint")


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class TimingOptions:
    """Time a recipe: its file first, then keys of it to change, each followed by its value."""

    config: Annotated[Config, NO_PREFIX, tyro.conf.FlagConversionOff]
    json: str | None = None
    """File to write the report to."""
    warmup: Natural = 3
    """Repeats before those that count."""
    repeats: Annotated[int, Range(3)] = 20
    """Repeats that count."""


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions(TimingOptions):
    """Time a recipe: its file first, then keys of it to change, each followed by its value."""

    real_data: bool = False
    """bench train: feed the step from the recipe's data; the default repeats one random batch."""
    peak_tflops: Positive | None = None
    """bench train and sample: peak TFLOP/s of one device, for a chip that the table lacks."""
    images: Count | None = None
    """bench sample: images in a batch; chosen for the device by default."""
    folder: str | None = None
    """bench checkpoint: where to write, local or gs://; a temporary folder by default."""
    trace: str | None = None
    """Folder of a trace for xprof, local or gs://, of a few more repeats after those that count."""


def run_benchmark(kind: str, options: BenchOptions) -> None:
    """Run one of `KINDS`, print its report, and write it to `--json`.

    Raises:
      UserError: numbers out of range, or what the benchmark itself raises.
    """

    check_text(options.folder or "", "--folder")
    check_text(options.trace or "", "--trace")
    if options.trace:
        make_folder(options.trace)  # before the work

    def measure(config: Config, *, warmup: int, repeats: int) -> list[Measurement]:
        turns: Any = {"warmup": warmup, "repeats": repeats, "trace": options.trace}
        peak = options.peak_tflops
        match kind:
            case "train":
                real = options.real_data
                return [time_training(config, real=real, peak_tflops=peak, **turns)]
            case "sample":
                count = options.images
                return [time_sampling(config, batch_size=count, peak_tflops=peak, **turns)]
            case "data":
                return [time_batches(config, **turns)]
        return [time_checkpoints(config, folder=options.folder, **turns)]

    measure_and_report(kind, options, measure)


def measure_and_report(
    kind: str, options: TimingOptions, measure: Callable[..., list[Measurement]]
) -> None:
    """Call `measure(config, warmup=, repeats=)`, print the report, and write it to `--json`.

    Raises:
      UserError: numbers out of range, or what `measure` raises.
    """
    if options.json:
        make_folder(epath.Path(options.json).parent)  # before the work
    with console(stderr=True).status(f"bench {kind}: compiling, then timing"):
        results = measure(options.config, warmup=options.warmup, repeats=options.repeats)
    given = {
        f.name: getattr(options, f.name)
        for f in dataclasses.fields(options)
        if f.name not in ("config", "json")
    }
    report = make_report(kind, options.config, given, results)
    write_text(format_report(report))
    if options.json:
        write_report(options.json, report)
        write_line(f"Wrote {options.json}")


def bench_compare(before: str, after: str) -> None:
    """Print what changed by more than noise between two reports; raise `UserError` for others."""
    write_text(compare(read_report(before), read_report(after)))


def bench_command(arguments: list[str]) -> None:
    """Run `jaxdiff bench train|sample|data|checkpoint [RECIPE] ...`, or `bench compare A B`."""
    kind, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if kind in ("-h", "--help"):
        write_line(f"usage: jaxdiff bench {{{','.join(KINDS)}}} [RECIPE] ...  (--help after each)")
        write_line("       jaxdiff bench compare BEFORE.json AFTER.json")
    elif kind == "compare":
        if len(rest) != 2:
            raise UserError(f"jaxdiff bench compare got {len(rest)} words: expected two reports.")
        bench_compare(*rest)
    elif kind in KINDS:
        run_benchmark(kind, parse_recipe_flags(BenchOptions, rest, prog="jaxdiff bench"))
    else:
        raise UserError(
            f"There is no benchmark {kind!r}: there are {', '.join(KINDS)}, and compare."
        )
