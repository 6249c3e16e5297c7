"""Train on CIFAR-10 without text, beside diffusers' example, and plot the quality over the time.

    pip install torch==2.13.0 matplotlib && pip install -e '.[parity]'
    python -m benchmarks.cifar10_against_diffusers --data cifar10-train.parquet

jaxdiff trains `configs/cifar10.py`, and diffusers a UNet2DModel as its example for unconditional
images does (`torch_unconditional`), each for `--minutes`, one after the other, with all cores. Both
end with the clock: diffusers' learning rate falls with it, and jaxdiff's stays as it is for 0.7 of
the minutes, whose steps say how many the decay has. Both save the EMA every few minutes. The score
of a snapshot is the Frechet distance of `--samples` images from the photographs of the training, in
the features of a small classifier of the same photographs (`photo_classifier`), and is no FID. A
tenth of the photographs is left out of all training: the distance of as many of these as there are
samples is the floor.

Each stage skips what it finds in `--out` and resumes what is unfinished: run the same command again
after an interruption. `--stages jaxdiff` and `--stages diffusers` may run at the same time, each
with half of the cores (`taskset`) for twice the minutes, so that both have the same machine. Two
cores take 2 hours to train, and by arithmetic about an hour to sample each snapshot of diffusers.
"""

import dataclasses
import functools
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
from etils import epath
from PIL import Image

from benchmarks import torch_unconditional
from benchmarks.photo_classifier import (
    FEATURES,
    Photos,
    accuracy,
    features_of,
    train_classifier,
)
from jaxdiff.benchmark.train import time_training
from jaxdiff.cli.parsing import parse_flags
from jaxdiff.config.checked import checked
from jaxdiff.config.fields import Count, Positive
from jaxdiff.config.recipe_files import find_recipe
from jaxdiff.data.sources.parquet import Parquet
from jaxdiff.errors import UserError
from jaxdiff.evaluation.distances import frechet, frechet_infinity, moments_of, root_factor
from jaxdiff.io.files import write_whole
from jaxdiff.io.images import grid, save_png
from jaxdiff.io.text import format_json, parse_json, read_json, read_text
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.bundle import CHECKPOINTS, CONFIG, read_weights, write_weights
from jaxdiff.pretrained.checkpoint_folder import load_part, steps
from jaxdiff.pretrained.run_folder import read_run
from jaxdiff.pretrained.safetensors_io import to_device
from jaxdiff.training.metrics import RECORDS
from jaxdiff.training.optimizer import WarmupStableDecay
from jaxdiff.training.recipe import Config, config_from_json, load_recipe
from jaxdiff.training.run import SUMMARY, run_recipe

replace = dataclasses.replace
HELD_OUT = 10  # one of so many photographs
PART = 256  # images that are sampled, and stored, at a time
SHOWN = 64  # images of a grid
STOPPED = "The training was stopped: the same command resumes it."
MARGIN = 0.95  # of the minutes, so that jaxdiff's decay does not end after them
OPEN_END = 10_000_000  # steps of a run whose decay has not begun


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Train jaxdiff and diffusers on CIFAR-10 for equal minutes, and compare their images."""

    data: str = "cifar10-train.parquet"
    """Parquet file with columns image and caption; the captions are the classes."""
    out: str = "benchmarks/results/cifar10"
    """Folder of everything; the same command resumes there."""
    minutes: Positive = 60
    """Of training, of each."""
    every: Positive = 15
    """Minutes between snapshots."""
    samples: Count = 2000
    """Images of a snapshot."""
    networks: tuple[str, ...] = ("example",)
    """Of diffusers, each of them trained: example, small, ddpm-cifar10."""
    ddim_steps: Count = 50
    """Of diffusers' sampler; jaxdiff's is the recipe's."""
    epochs: Count = 5
    """Of the classifier."""
    stages: tuple[str, ...] = ("classifier", "jaxdiff", "diffusers", "scores")
    """Some of these."""

    @property
    def folder(self) -> Path:
        """Folder of the trainings of these minutes; data and classifier are shared."""
        return Path(self.out) / f"{self.minutes:g}_minutes"


def prepare(options: Options) -> tuple[Photos, np.ndarray]:
    """Return all photographs and their classes; those held out are the last tenth.

    Raises:
      UserError: there is no such file.
    """
    folder = Path(options.out)
    files = folder / "photos.npy", folder / "labels.npy"
    if not (folder / "train.parquet").exists():
        if not Path(options.data).is_file():
            raise UserError(f"--data {options.data}: expected a Parquet file; there is none.")
        table = pq.read_table(options.data, columns=["image", "caption"])
        images = [row["bytes"] for row in table["image"].to_pylist()]
        photos = np.stack([np.asarray(Image.open(io.BytesIO(x)).convert("RGB")) for x in images])
        captions = np.unique(table["caption"].to_numpy(), return_inverse=True)
        for file, array in zip(files, (photos, captions[1]), strict=True):
            save_array(file, array)
        partial = folder / "train.parquet.partial"
        pq.write_table(table.slice(0, train_count(len(table))), partial, row_group_size=5000)
        partial.replace(folder / "train.parquet")
    return np.load(files[0]), np.load(files[1])


def save_array(file: Path, array: np.ndarray) -> None:
    """Write an .npy file whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_whole(epath.Path(file), buffer.getvalue())


def train_count(count: int) -> int:
    """Return the number of photographs that are trained on."""
    return count - count // HELD_OUT


def classifier(options: Options) -> Any:
    """Return the trained classifier, and print its accuracy when it is trained."""
    file = epath.Path(options.out) / f"classifier_{options.epochs}.safetensors"
    if not file.exists():
        photos, labels = prepare(options)
        count = train_count(len(photos))
        params = train_classifier(photos[:count], labels[:count], epochs=options.epochs, log=say)
        found = accuracy(params, photos[count:], labels[count:])
        about = {"epochs": options.epochs, "accuracy": found, "held_out": len(photos) - count}
        write_whole(file.with_suffix(".json"), format_json(about).encode())
        write_weights(file, params)
    say(f"classifier: {read_text(file.with_suffix('.json'))}")
    return read_weights(file)


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def recipe_of(options: Options) -> Config:
    """Return jaxdiff's recipe without an end, with snapshots at intervals on this machine."""
    config = load_recipe(find_recipe("cifar10"))
    path = str(Path(options.out) / "train.parquet")
    source = Parquet(path=path, caption="caption")
    config = replace(
        config,
        data=replace(config.data, source=source),
        train=replace(config.train, keep=1000, evaluate=False),
    )
    timed = time_training(config, warmup=3, repeats=12, real=True, peak_tflops=None)
    every = max(1, round(options.every * 60 / median(timed.seconds)))
    log_every = min(config.train.log_every, every)
    train = replace(config.train, steps=OPEN_END, checkpoint_every=every, log_every=log_every)
    return replace(config, train=train)


def train_jaxdiff(options: Options) -> None:
    """Train the recipe, or resume it; the clock ends its constant part, and the decay follows.

    Raises:
      UserError: a signal stopped the training.
    """
    prepare(options)
    run = epath.Path(options.folder / "jaxdiff")
    if (run / SUMMARY).exists():
        return
    started = (run / CONFIG).exists()
    config = config_from_json(read_json(run / CONFIG)) if started else recipe_of(options)
    schedule = config.optimizer.schedule
    assert isinstance(schedule, WarmupStableDecay)
    constant = 1 - schedule.decay_fraction
    if config.train.steps == OPEN_END:
        train_until(run, config, MARGIN * constant * options.minutes)
        taken = max(steps((run / CHECKPOINTS).resolve()))
        config = replace(config, train=replace(config.train, steps=round(taken / constant)))
    if not run_recipe(config, str(run), log=say).finished:
        raise UserError(STOPPED)


def train_until(run: epath.Path, config: Config, minutes: float) -> None:
    """Train until a run has trained for these minutes in all; a signal of our own then stops it.

    Raises:
      UserError: another signal stopped the training.
    """

    def trained() -> float:
        return jaxdiff_minutes(run)[1][-1]

    def watch() -> None:
        while not done.wait(0.5):
            if trained() >= minutes:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    if trained() >= minutes:
        return
    done = threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run_recipe(config, str(run), log=say)
    finally:
        done.set()
        watcher.join()
    if trained() < minutes:
        raise UserError(STOPPED)


def train_diffusers(options: Options) -> None:
    """Train each network of diffusers, or resume it."""
    photos = prepare(options)[0]
    for network in options.networks:
        training = torch_unconditional.Training(
            network=network, minutes=options.minutes, every=options.every
        )
        folder = options.folder / f"diffusers-{network}"
        torch_unconditional.train(training, folder, photos[: train_count(len(photos))], say)


def jaxdiff_minutes(run: epath.Path) -> tuple[list[int], list[float]]:
    """Return steps and the minutes of training until each, without compilation."""
    at, minutes = [0], [0.0]
    if (run / RECORDS).exists():
        whole_lines = read_text(run / RECORDS).rpartition("\n")[0]
        for line in whole_lines.splitlines():
            record = parse_json(line, run / RECORDS)
            if "step_s" in record:
                minutes.append(minutes[-1] + (record["step"] - at[-1]) * record["step_s"] / 60)
                at.append(record["step"])
    return at, minutes


def jaxdiff_snapshots(run: epath.Path) -> dict[int, float]:
    """Return the minutes of training of each checkpoint, by its step."""
    saved = steps((run / CHECKPOINTS).resolve())
    return {step: float(np.interp(step, *jaxdiff_minutes(run))) for step in saved}


def jaxdiff_sampler(run: epath.Path, step: int) -> Callable[[range], Photos]:
    """Return a function from seeds to images of a checkpoint's EMA, with the recipe's sampler."""
    root = run.resolve()
    average = jax.device_get(load_part(root / CHECKPOINTS / str(step), "ema"))
    pipe = Pipeline(read_run(root, read_json(root / CONFIG), to_device, trained=average))
    return lambda seeds: pipe([""] * len(seeds), seeds=seeds)


def sampled(folder: Path, count: int, load: Callable[[], Callable[[range], Photos]]) -> Photos:
    """Return `count` images, the seeds from 0; those in the folder are read instead."""
    sample, parts = None, []
    for start in range(0, count, PART):
        seeds = range(start, min(count, start + PART))
        file = folder / f"{seeds.start:05d}_{seeds.stop:05d}.npy"
        if not file.exists():
            sample = sample or load()
            save_array(file, sample(seeds))
            say(f"{folder}: {seeds.stop} of {count} images")
        parts.append(np.load(file))
    return np.concatenate(parts)


def score(options: Options) -> None:
    """Sample and score every snapshot, and write report.json, grids and curves.png."""
    photos, _ = prepare(options)
    params, count = classifier(options), train_count(len(photos))
    reference = moments_of(features_of(params, photos[:count]))
    root = root_factor(reference.covariance)

    def distances(images: Photos) -> dict[str, float]:
        features = features_of(params, images)
        found = {"frechet": frechet(moments_of(features), reference, root)}
        if len(images) > 2 * FEATURES:
            found["frechet_infinity"] = frechet_infinity(features, reference, root)
        return found

    held_out = photos[count:][: options.samples]
    report: dict[str, Any] = {
        "classifier": read_json(Path(options.out) / f"classifier_{options.epochs}.json"),
        "minutes": options.minutes,
        "samples": options.samples,
        "cores": len(os.sched_getaffinity(0)),
        "diffusers": {
            n: torch_unconditional.settings(n, options.ddim_steps) for n in options.networks
        },
        "held_out_photographs": {"images": len(held_out), **distances(held_out)},
        "snapshots": [],
    }
    folder = options.folder
    for side, snapshots, load in _sides(options, photos.shape[1]):
        for step, minutes in snapshots.items():
            name = f"{side}-{step:06d}"
            key = "" if side == "jaxdiff" else f"-ddim{options.ddim_steps}"
            images = sampled(folder / "images" / f"{name}{key}", options.samples, load(step))
            save_png(epath.Path(folder / f"{name}.png"), grid(images[:SHOWN], scale=2))
            row = {"side": side, "step": step, "minutes": minutes, **distances(images)}
            report["snapshots"].append(row)
            say(f"{side}: {minutes:.1f} minutes, distance {row['frechet']:.3f}")
    text = format_json(report, indent=2)
    write_whole(epath.Path(folder / "report.json"), f"{text}\n".encode())
    plot(report, folder / "curves.png")


def _sides(options: Options, size: int):
    """Yield the name, the snapshots and the sampler of a snapshot for each trained model."""
    run = epath.Path(options.folder / "jaxdiff")
    yield (
        "jaxdiff",
        jaxdiff_snapshots(run),
        lambda step: functools.partial(jaxdiff_sampler, run, step),
    )
    for network in options.networks:
        folder = options.folder / f"diffusers-{network}"
        make = functools.partial(
            torch_unconditional.sampler, folder, network, size=size, num_steps=options.ddim_steps
        )
        yield (
            folder.name,
            torch_unconditional.snapshots(folder),
            lambda step, make=make: functools.partial(make, step),
        )


def plot(report: dict[str, Any], file: Path) -> None:
    """Plot the distance over the minutes of training; without matplotlib, say what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("curves.png needs matplotlib: pip install matplotlib, then repeat the command.")
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for side in dict.fromkeys(row["side"] for row in report["snapshots"]):
        rows = [row for row in report["snapshots"] if row["side"] == side]
        x, y = [row["minutes"] for row in rows], [row["frechet"] for row in rows]
        axes.plot(x, y, marker="o", label=side)
    floor = report["held_out_photographs"]["frechet"]
    axes.axhline(floor, color="grey", linestyle="--", label="held-out photographs")
    axes.set(xlabel="minutes of training", ylabel="Fréchet distance, classifier's features")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(file, dpi=120)
    say(f"{file}")


STAGES: dict[str, Callable[[Options], Any]] = {
    "classifier": classifier,
    "jaxdiff": train_jaxdiff,
    "diffusers": train_diffusers,
    "scores": score,
}


def _run_stage(stage: str, options: Options) -> None:
    STAGES[stage](options)


def main(arguments: Sequence[str]) -> int:
    """Run the stages, each in a process of its own; return the exit status."""
    try:
        options = parse_flags(Options, list(arguments), prog="cifar10_against_diffusers")
        _check_names("stages", options.stages, STAGES)
        _check_names("networks", options.networks, torch_unconditional.NETWORKS)
        for stage in options.stages:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                process.submit(_run_stage, stage, options).result()
    except UserError as error:
        print(f"cifar10_against_diffusers: {error}", file=sys.stderr)
        return 2
    return 0


def _check_names(flag: str, names: Sequence[str], known: Mapping[str, Any]) -> None:
    if unknown := set(names) - set(known):
        raise UserError(
            f"--{flag}: there is no {min(unknown)!r}: expected some of {', '.join(known)}."
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
