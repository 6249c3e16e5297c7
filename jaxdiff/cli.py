"""The `jaxdiff` command: train, sample, evaluate, export, prepare."""

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console

from jaxdiff import adapters, inversion
from jaxdiff.bundle import make_folder, read_bundle, write_bundle
from jaxdiff.config import Config, load_recipe, members
from jaxdiff.data.array_record import write_array_record
from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.pipeline import DataConfig
from jaxdiff.data.source import Record
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluate import evaluate_folder
from jaxdiff.pretrained.diffusers_folder import write_diffusers
from jaxdiff.pretrained.embeddings import write_embedding
from jaxdiff.pretrained.lora import write_lora
from jaxdiff.sample_command import SampleOptions, draw
from jaxdiff.training.diffusion import DiffusionTask
from jaxdiff.training.metrics import Progress
from jaxdiff.training.session import run_recipe

DEFAULT_RECIPE = Path(__file__).parent.parent / "configs" / "produce.py"
NO_PREFIX = tyro.conf.arg(name="")  # --train.steps rather than --config.train.steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 2 for a user's mistake, told in one sentence."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train,
        "sample": sample,
        "evaluate": evaluate,
        "export": export,
        "prepare": prepare,
    }
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        if name in ("-h", "--help"):
            print(f"usage: jaxdiff {{{','.join(commands)}}} ...  (--help after each tells more)")
            return 0
        if name not in commands:
            nearest = difflib.get_close_matches(name, commands, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(commands)}."
            raise UserError(f"There is no command {name!r}: {hint}")
        commands[name](rest)
    except UserError as error:
        print(f"jaxdiff: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:  # tyro's way out, after --help
        return int(end.code or 0)
    return 0


def parse(target: Any, arguments: list[str], *, prog: str, default: Any = None) -> Any:
    """Parses flags into a dataclass or the arguments of a function, through tyro.

    Raises:
      UserError: for a value that cannot be read or is missing; for a flag that there is not, with
        the nearest that there is.
    """
    options = {} if default is None else {"default": default}
    with contextlib.redirect_stderr(io.StringIO()) as box:
        try:
            value, unknown = tyro.cli(
                target,
                args=arguments,
                prog=prog,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
                **options,
            )
        except SystemExit as end:
            if not end.code:
                raise
            raise UserError(f"{_sentence(box.getvalue())} See {prog} --help.") from None
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"{prog} has no place for {flag!r}: see {prog} --help.")
        known = sorted(_flags(target if default is None else default))
        nearest = difflib.get_close_matches(flag.replace("_", "-"), known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"see {prog} --help."
        raise UserError(f"{prog} does not know {flag}: {hint}")
    return value


def _sentence(box: str) -> str:
    """A framed message of tyro's, what stands between its title and its next rule, as one line."""
    lines = (line.strip("│| ") for line in box.splitlines()[1:])
    parts = itertools.groupby(lines, key=lambda line: bool(line.strip("─-╰╯+ ")))
    told = next((" ".join(part) for is_text, part in parts if is_text), box)
    return f"{told[:1].upper()}{told[1:].rstrip('.')}."


def _flags(options: Any, prefix: str = "") -> list[str]:
    """All flags, as `--train.batch-size`, of a dataclass, and of a nested one by its default."""
    hints = typing.get_type_hints(
        options if isinstance(options, type) else type(options), include_extras=True
    )
    flags = []
    for f in dataclasses.fields(options):
        marks = typing.get_args(hints[f.name])[1:]
        value = getattr(options, f.name, None)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            own = "" if NO_PREFIX in marks else f"{f.name}."
            flags += _flags(value, prefix + own)
        elif tyro.conf.Positional not in marks and not _is_part(hints[f.name]):
            flags.append(f"--{prefix}{f.name}".replace("_", "-"))
    return flags


def _is_part(hint: Any) -> bool:
    """Whether a field holds a dataclass, whose keys are flags, while it has none of its own."""
    return any(dataclasses.is_dataclass(c) for c in members(hint))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Trains a recipe: its file first, then keys of it to change, each followed by its value."""

    config: Annotated[Config, NO_PREFIX, tyro.conf.FlagConversionOff]
    out: str | None = None
    """The run's folder, local or gs://; runs/NAME by default."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder: what happens anyway."""
    fresh: bool = False
    """Start anew, removing the run in the folder."""


def _recipe(arguments: list[str]) -> tuple[Config, list[str]]:
    """The recipe whose file comes first, or the default one, and the arguments after it."""
    if arguments and not arguments[0].startswith("-"):
        return load_recipe(arguments[0]), arguments[1:]
    return load_recipe(DEFAULT_RECIPE), arguments


def train(arguments: list[str]) -> None:
    """`jaxdiff train [RECIPE] [--path.to.key VALUE ...] [--out DIR] [--resume | --fresh]`."""
    config, arguments = _recipe(arguments)
    options = parse(TrainOptions, arguments, prog="train", default=TrainOptions(config=config))
    if options.resume and options.fresh:
        raise UserError("--resume and --fresh exclude each other: give one of them.")
    run_recipe(options.config, options.out or f"runs/{options.config.name}", fresh=options.fresh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Scores a trained model."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run or of an exported model, or `shipped:NAME`."""
    samples: int = 500
    """Prompts of each kind."""
    batch_size: int | None = None
    """Images drawn at a time; chosen for the device by default."""


def evaluate(arguments: list[str]) -> None:
    """`jaxdiff evaluate RUN [--samples N]`: prints and saves the scores of a trained model."""
    options = parse(EvaluateOptions, arguments, prog="jaxdiff evaluate")
    evaluate_folder(options.run, samples=options.samples, batch_size=options.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Writes a trained model as one small folder that `jaxdiff.load` and `--model` take."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run or of a model."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write."""
    format: str = "jaxdiff"
    """jaxdiff; diffusers: what StableDiffusionPipeline.from_pretrained opens, or XL's, adapters
    and new words made part of the weights; lora: the adapters alone, for load_lora_weights;
    embedding: the new word alone, for load_textual_inversion."""
    dtype: str | None = None
    """Type of the weights: bfloat16, float16 or float32; by default bfloat16, and in the format of
    diffusers the type that they have."""


def export(arguments: list[str]) -> None:
    """`jaxdiff export RUN_OR_MODEL OUT [--format FORMAT] [--dtype TYPE]`."""
    options = parse(ExportOptions, arguments, prog="jaxdiff export")
    if options.dtype not in (None, "bfloat16", "float16", "float32"):
        raise UserError(f"--dtype {options.dtype}: expected bfloat16, float16 or float32.")
    if options.format not in ("jaxdiff", "diffusers", "lora", "embedding"):
        raise UserError(
            f"--format {options.format}: expected jaxdiff, diffusers, lora or embedding."
        )
    bundle = read_bundle(options.run)
    if options.format == "embedding":
        word = inversion.word_of(bundle)
        if word is None:
            raise UserError(
                f"{options.run} has learnt no word: expected a run of a recipe with "
                "task.inversion, such as configs/sd15_inversion.py."
            )
        write_embedding(make_folder(options.out), word)
    elif options.format == "jaxdiff":
        write_bundle(make_folder(options.out), bundle, options.dtype or "bfloat16")
    else:
        if options.dtype:
            cast = functools.partial(jax.tree.map, lambda x: x.astype(options.dtype))
            bundle = bundle._replace(params=cast(bundle.params), frozen=cast(bundle.frozen))
        bundle = inversion.settled(bundle)
        found = adapters.adapters_of(bundle)
        if options.format == "lora":
            if not found:
                raise UserError(
                    f"{options.run} has no adapters: expected a run of a recipe with task.lora, "
                    "such as configs/sd15_lora.py."
                )
            assert isinstance(bundle.config.task, DiffusionTask)  # no other has adapters
            write_lora(make_folder(options.out), found, bundle.config.task)
        else:
            merged = adapters.merge(adapters.detach(bundle), found) if found else bundle
            write_diffusers(make_folder(options.out), merged)
    print(f"Wrote {options.out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Writes a recipe's records as ArrayRecord files, fast to read at random from many hosts.

    The recipe's file comes first, then the folder, then keys of the recipe to change. Records that
    the recipe could not be trained on are named and left out.
    """

    config: Annotated[Config, NO_PREFIX, tyro.conf.FlagConversionOff]
    out: Annotated[str | None, tyro.conf.Positional] = None
    """Folder to write."""


def prepare(arguments: list[str]) -> None:
    """`jaxdiff prepare RECIPE OUT [--data.source.KEY VALUE ...]`."""
    config, arguments = _recipe(arguments)
    default = PrepareOptions(config=config)
    options = parse(PrepareOptions, arguments, prog="jaxdiff prepare", default=default)
    if options.out is None:
        raise UserError("There is no folder to write: give it after the recipe.")
    data = options.config.data
    data.source.check()
    path = make_folder(options.out) / "records.array_record"
    console = Console(stderr=True)
    with Progress(len(data.source), unit="record", console=console) as progress:
        records = _usable(data, progress)
        first = next(records, None)
        if first is None:
            raise UserError(
                f"None of the {len(data.source)} records can be used, as told above: repair them, "
                "or name other data in data.source."
            )
        count = write_array_record(str(path), itertools.chain([first], records))
    print(f"Wrote {count} records to {path}")


def _usable(data: DataConfig, progress: Progress) -> Iterator[Record]:
    """The records that can be trained on; the others are named."""
    for i in range(len(data.source)):
        try:
            record = data.source[i]
            data.transforms(record, np.random.default_rng(0))  # as training does, to see if it can
        except RecordError as error:
            print(f"Skipped {error}", file=sys.stderr)
        else:
            yield record
        progress.update(i + 1)


def sample(arguments: list[str]) -> None:
    """`jaxdiff sample PROMPT ... [--model DIR] [--out DIR] ...`."""
    draw(parse(SampleOptions, arguments, prog="sample"))


if __name__ == "__main__":
    sys.exit(main())
