"""The `jaxdiff` command: train, sample, evaluate, export, prepare."""

import dataclasses
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxdiff.bundle import read_bundle, write_bundle
from jaxdiff.config import Config
from jaxdiff.data.array_record import write_array_record
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluate import evaluate_folder
from jaxdiff.sample_command import SampleOptions, draw
from jaxdiff.training.session import run_recipe

DEFAULT_RECIPE = Path(__file__).parent.parent / "configs" / "produce.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 2 for a mistake of the user's, told in one line."""
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
    return 0


def load_recipe(path: str | os.PathLike[str]) -> Config:
    """The `Config` that a recipe's `get_config()` returns.

    Raises:
      UserError: no such file, or no `get_config` in it.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(str(p) for p in DEFAULT_RECIPE.parent.glob("*.py"))
        nearest = difflib.get_close_matches(str(path), there, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]}?" if nearest else "give the path of a file in configs/."
        raise UserError(f"There is no recipe {path}: {hint}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no recipe: expected a Python file; see configs/.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} defines no get_config(): a recipe returns its Config from it.")
    return module.get_config()


def parse(target: Any, arguments: list[str], *, prog: str, default: Any = None) -> Any:
    """Parses flags into a dataclass or the arguments of a function, through tyro.

    Raises:
      UserError: for a flag that there is not, with the nearest that there is.
    """
    options = {} if default is None else {"default": default}
    value, unknown = tyro.cli(
        target,
        args=arguments,
        prog=prog,
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
        **options,
    )
    if unknown:
        known = sorted(_flags(target, default))
        flag = unknown[0].split("=")[0]
        nearest = difflib.get_close_matches(flag.replace("_", "-"), known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"see {prog} --help."
        raise UserError(f"{prog} does not know {flag}: {hint}")
    return value


def _flags(target: Any, default: Any) -> list[str]:
    """All flags, as `--train.batch-size`, of a dataclass or of its nested default."""
    value = target if default is None else default

    def walk(value: Any, prefix: str) -> list[str]:
        names = []
        for f in dataclasses.fields(value):
            name = f"{prefix}{f.name.replace('_', '-')}"
            inner = getattr(value, f.name, None)
            nested = dataclasses.is_dataclass(inner) and not isinstance(inner, type)
            names += walk(inner, f"{name}.") if nested else [f"--{name}"]
        return names

    return walk(value, "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run's folder is, and whether to go on in it."""

    out: str | None = None
    """The run's folder, local or gs://; runs/NAME by default."""
    resume: bool = True
    """Go on from the newest checkpoint in the folder: what happens anyway."""
    fresh: bool = False
    """Start anew, removing the run in the folder."""


def train(arguments: list[str]) -> None:
    """`jaxdiff train [RECIPE] [--path.to.key VALUE ...] [--out DIR] [--resume | --fresh]`."""
    recipe: str | Path = DEFAULT_RECIPE
    if arguments and not arguments[0].startswith("-"):
        recipe, arguments = arguments[0], arguments[1:]
    config = load_recipe(recipe)
    own, overrides = _split(arguments, ("--out", "--resume", "--fresh"))
    options = parse(RunOptions, own, prog="train")
    config = parse(type(config), overrides, prog="train", default=config)

    run_recipe(config, options.out or f"runs/{config.name}", fresh=options.fresh)


def _split(arguments: list[str], names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Flags of these names, with their values, and the rest."""
    own: list[str] = []
    rest: list[str] = []
    target = rest
    for argument in arguments:
        if argument.startswith("--"):
            target = own if argument.split("=")[0] in names else rest
        target.append(argument)
    return own, rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Scores a trained model."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run or of an exported model, or `shipped`."""
    samples: int = 500
    """Prompts of each kind."""
    batch_size: int = 64
    """Images drawn at a time."""


def evaluate(arguments: list[str]) -> None:
    """`jaxdiff evaluate RUN [--samples N]`: prints and saves the scores of a trained model."""
    options = parse(EvaluateOptions, arguments, prog="jaxdiff evaluate")
    evaluate_folder(options.run, samples=options.samples, batch_size=options.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Writes a trained model as one small folder that `jaxdiff.load` and `--model` take."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write."""
    dtype: str = "bfloat16"
    """Type of the weights: bfloat16, float16 or float32."""


def export(arguments: list[str]) -> None:
    """`jaxdiff export RUN OUT [--dtype TYPE]`."""
    options = parse(ExportOptions, arguments, prog="jaxdiff export")
    if options.dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"--dtype {options.dtype}: expected bfloat16, float16 or float32.")
    write_bundle(options.out, read_bundle(options.run), options.dtype)
    print(f"Wrote {options.out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Writes a recipe's records as ArrayRecord files, fast to read at random from many hosts."""

    recipe: Annotated[str, tyro.conf.Positional]
    """The recipe whose data are written."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write."""


def prepare(arguments: list[str]) -> None:
    """`jaxdiff prepare RECIPE OUT`."""
    options = parse(PrepareOptions, arguments, prog="jaxdiff prepare")
    source = load_recipe(options.recipe).data.source
    source.check()
    records = (source[i] for i in range(len(source)))
    path = f"{options.out}/records.array_record"
    print(f"Wrote {write_array_record(path, records)} records to {path}")


def sample(arguments: list[str]) -> None:
    """`jaxdiff sample PROMPT ... [--model DIR] [--out DIR] ...`."""
    draw(parse(SampleOptions, arguments, prog="sample"))


if __name__ == "__main__":
    sys.exit(main())
