"""A whole run as a user starts it: train, draw samples on the way, score at the end."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree, UInt8

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.cached_latents import CachedLatents
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.distributed.multihost import broadcast, is_lead, to_host
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluate import check_scorable, evaluate, table
from jaxdiff.io import images as pictures
from jaxdiff.io.files import write_whole
from jaxdiff.models.layers import bind_init, merge
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.training.loop import Hook, Result, train
from jaxdiff.training.recipe import Config
from jaxdiff.training.state import TrainState
from jaxdiff.training.tasks.autoencoder import AutoencoderTask
from jaxdiff.training.tasks.base import from_uint8
from jaxdiff.training.tasks.diffusion import DiffusionTask
from jaxdiff.training.workdir import told_if_full

SUMMARY = "summary.json"
STRIP_LENGTH = 8
RECONSTRUCTIONS = 16


def run_recipe(
    config: Config, out: str, *, fresh: bool = False, say: Callable[[str], None] = print
) -> Result:
    """Trains a recipe in the folder `out`, then writes `summary.json` with what became of it.

    That is written before the scoring and again with its figures, so that a score which fails takes
    nothing away. The same command once more scores what is not scored yet, and nothing twice.

    Raises:
      UserError: as `jaxdiff.training.loop.train`; or, before any training, what cannot be scored.
    """
    folder = epath.Path(out)
    say = say if is_lead() else _silent
    scored = isinstance(config.task, DiffusionTask) and config.eval_samples != 0
    if scored:
        _check_scoring(config)
    with told_if_full(folder):
        return _run_recipe(config, folder, fresh, scored, say)


def _run_recipe(
    config: Config, folder: epath.Path, fresh: bool, scored: bool, say: Callable[[str], None]
) -> Result:
    result = train(config, folder, fresh=fresh, on_sample=_samples(config, folder, say), say=say)
    if not result.finished:
        say(f"Stopped at step {result.summary['step']}; the same command goes on from there.")
        return result
    earlier = json.loads(broadcast(json.dumps(_read_summary(folder))))
    if earlier.get("fingerprint") == result.summary["fingerprint"]:
        result = result._replace(summary=earlier)  # whose speeds are those of the training
    if "scores" in result.summary:
        say(f"{folder} has its scores already; jaxdiff evaluate {folder} takes them anew.")
    else:
        _write_summary(folder, result)
        if scored:
            pipeline = Pipeline(_bundle(config, result.state, result.frozen, result.tokenizer))
            say(f"Scoring {config.eval_samples} samples of each kind.")
            result.summary["scores"] = evaluate(pipeline, samples=config.eval_samples)
            say(table(result.summary["scores"]))
            _write_summary(folder, result)
    say(f"Finished at step {result.summary['step']}: {folder}")
    return result


def _silent(_sentence: str) -> None:
    """What all hosts would say, one of them does."""


def _check_scoring(config: Config) -> None:
    """Raises `UserError` for what would fail only after the training."""
    if config.eval_samples < 2:
        raise UserError(
            f"eval_samples is {config.eval_samples}: expected at least 2, and 500 for firm "
            "figures; eval_samples 0 leaves the scoring out."
        )
    check_scorable(config)


def _read_summary(folder: epath.Path) -> dict[str, Any]:
    """What an earlier end of the run wrote; {} where there is none that can be read."""
    try:
        return json.loads((folder / SUMMARY).read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _write_summary(folder: epath.Path, result: Result) -> None:
    if is_lead():
        text = json.dumps(result.summary, indent=2) + "\n"
        write_whole(folder / SUMMARY, text.encode())


def _bundle(config: Config, state: TrainState, frozen: PyTree, tokenizer: Tokenizer) -> Bundle:
    return Bundle(config, state.ema, frozen, tokenizer)


def _samples(config: Config, out: epath.Path, say: Callable[[str], None]) -> Hook | None:
    """What to draw of a model in training: prompts, or an autoencoder's images beside its own."""
    if isinstance(config.task, DiffusionTask) and config.sampling.prompts:
        return lambda *state: _draw_prompts(_bundle(config, *state), int(state[0].step), out, say)
    if isinstance(config.task, AutoencoderTask):
        return lambda state, *_: _draw_reconstructions(config, state, out, say)
    return None


def _draw_prompts(bundle: Bundle, step: int, out: epath.Path, say: Callable[[str], None]) -> None:
    """`samples/step_N.png`, a grid of the recipe's prompts, and their making as a strip."""
    prompts = list(bundle.config.sampling.prompts)
    snapshots = Pipeline(bundle)(prompts, num_snapshots=STRIP_LENGTH)
    if not is_lead():
        return
    path = out / "samples" / f"step_{step:06d}.png"
    pictures.save_png(path, pictures.grid(snapshots[-1], captions=prompts, scale=2))
    strip = pictures.strip(snapshots[:, :4])
    pictures.save_png(out / "samples" / f"step_{step:06d}_strip.png", strip)
    say(f"Samples: {path}")


def _draw_reconstructions(
    config: Config, state: TrainState, out: epath.Path, say: Callable[[str], None]
) -> None:
    """`samples/step_N.png`: records of the data in the upper rows, what comes back in the lower."""
    images = np.stack(list(itertools.islice(_usable(config.data), RECONSTRUCTIONS)))

    @jax.jit
    def reconstruct(params, images):
        model = merge(bind_init(type(config.task).build, config.task), params)
        return model.decode(model.encode(from_uint8(images)).mode())

    back = pictures.to_uint8(to_host(reconstruct(state.ema, images)))
    if not is_lead():
        return
    path = out / "samples" / f"step_{int(state.step):06d}.png"
    pictures.save_png(path, pictures.grid(np.concatenate([images, back]), columns=8, scale=2))
    say(f"Reconstructions: {path}")


def _usable(data: DataConfig) -> Iterator[UInt8[np.ndarray, "h w c"]]:
    """Images of the records in their order; bad ones, which the pipeline names, are left out."""
    source, rng = data.source, np.random.default_rng(0)
    assert not isinstance(source, CachedLatents)  # of which no autoencoder is trained
    for i in range(len(source)):
        try:
            image = data.transforms(source[i], rng).image
        except RecordError:
            continue
        yield image
