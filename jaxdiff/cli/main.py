"""The `jaxdiff` command: train, sample, evaluate, export, prepare, explore, plan, bench."""

import dataclasses
import difflib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import tyro

from jaxdiff.cli.bench import KINDS, BenchOptions, bench_compare, run_benchmark
from jaxdiff.cli.explore import ExploreOptions, explore_data
from jaxdiff.cli.generate.command import SampleOptions, draw
from jaxdiff.cli.parsing import NO_PREFIX, parse, read_recipe
from jaxdiff.cli.plan import plan
from jaxdiff.cli.prepare import prepare
from jaxdiff.distributed.distributed_init import Hosts, join_hosts
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluate import evaluate_folder
from jaxdiff.io.files import check_reachable
from jaxdiff.pipelines import lora as adapters
from jaxdiff.pipelines import textual_inversion
from jaxdiff.pretrained.diffusers import write_diffusers
from jaxdiff.pretrained.embeddings import write_embedding
from jaxdiff.pretrained.load import make_folder, read_bundle, write_bundle
from jaxdiff.pretrained.lora import write_lora
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.training.recipe import Config
from jaxdiff.training.run import run_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 2 for a user's mistake, told in one sentence."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train,
        "sample": sample,
        "evaluate": evaluate,
        "export": export,
        "prepare": prepare,
        "explore": explore,
        "plan": plan,
        "bench": bench,
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
        for path in (word.rpartition("=")[2] for word in rest):
            if path.startswith("gs://"):
                check_reachable(path)
        commands[name](rest)
    except UserError as error:
        print(f"jaxdiff: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:  # tyro's way out, after --help
        return int(end.code or 0)
    return 0


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
    hosts: Hosts = dataclasses.field(default_factory=Hosts)


def train(arguments: list[str]) -> None:
    """`jaxdiff train [RECIPE] [--path.to.key VALUE ...] [--out DIR] [--resume | --fresh]`."""
    config, arguments = read_recipe(arguments)
    options = parse(TrainOptions, arguments, prog="train", default=TrainOptions(config=config))
    if options.resume and options.fresh:
        raise UserError("--resume and --fresh exclude each other: give one of them.")
    out = options.out or f"runs/{options.config.name}"
    with join_hosts(options.hosts):
        run_recipe(options.config, out, fresh=options.fresh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Scores a trained model."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run or of an exported model, or `shipped:NAME`."""
    samples: int = 500
    """Prompts of each kind."""
    batch_size: int | None = None
    """Images drawn at a time; chosen for the device by default."""
    guidance_scale: float | None = None
    """How closely to follow the prompts, 1 is unguided; the model's own by default."""
    best_of: int = 1
    """Draw this many for each prompt, and score the one that a CLIP finds closest to it."""
    clip_scale: float = 0.0
    """How strongly a CLIP steers every step toward the prompt; 0 is without."""
    clip_model: str = ClipGuidance.model
    """That CLIP: its folder (a run, exported, or of transformers), `shipped:NAME` or OWNER/NAME."""
    hosts: Hosts = dataclasses.field(default_factory=Hosts)


def evaluate(arguments: list[str]) -> None:
    """`jaxdiff evaluate RUN [--samples N]`: prints and saves the scores of a trained model."""
    options = parse(EvaluateOptions, arguments, prog="jaxdiff evaluate")
    how = {name: value for name, value in vars(options).items() if name not in ("run", "hosts")}
    with join_hosts(options.hosts):
        evaluate_folder(options.run, **how)


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
        word = textual_inversion.word_of(bundle)
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
        bundle = textual_inversion.settled(bundle)
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


def sample(arguments: list[str]) -> None:
    """`jaxdiff sample PROMPT ... [--model DIR] [--out DIR] ...`."""
    options = parse(SampleOptions, arguments, prog="sample")
    with join_hosts(options.hosts):
        draw(options)


def explore(arguments: list[str]) -> None:
    """`jaxdiff explore RECIPE_OR_MODEL [--x LOW:HIGH] [--y LOW:HIGH] ...`."""
    explore_data(parse(ExploreOptions, arguments, prog="jaxdiff explore"))


def bench(arguments: list[str]) -> None:
    """`jaxdiff bench train|sample|data|checkpoint [RECIPE] ...`, or `bench compare A B`."""
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
        run_benchmark(kind, parse(BenchOptions, rest, prog="jaxdiff bench", default=default))
    else:
        raise UserError(
            f"There is no benchmark {kind!r}: there are {', '.join(KINDS)}, and compare."
        )


if __name__ == "__main__":
    sys.exit(main())
