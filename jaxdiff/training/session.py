"""A whole run as a user starts it: train, draw samples on the way, score at the end."""

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import PyTree

from jaxdiff import pictures
from jaxdiff.bundle import Bundle, write_whole
from jaxdiff.config import Config
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.evaluation.evaluate import evaluate, table
from jaxdiff.models.layers import merge
from jaxdiff.pipeline import Pipeline
from jaxdiff.training.autoencoder import AutoencoderTask
from jaxdiff.training.diffusion import DiffusionTask
from jaxdiff.training.loop import Hook, Result, train
from jaxdiff.training.state import TrainState
from jaxdiff.training.task import from_uint8

STRIP_LENGTH = 8


def run_recipe(
    config: Config, out: str, *, fresh: bool = False, say: Callable[[str], None] = print
) -> Result:
    """Trains a recipe in the folder `out`, then writes `summary.json` with what became of it.

    Raises:
      UserError: as `jaxdiff.training.loop.train`.
    """
    folder = epath.Path(out)
    result = train(config, folder, fresh=fresh, on_sample=_samples(config, folder, say), say=say)
    if not result.finished:
        say(f"Stopped at step {result.summary['step']}; the same command goes on from there.")
        return result
    if isinstance(config.task, DiffusionTask) and config.eval_samples:
        pipeline = Pipeline(_bundle(config, result.state, result.frozen, result.tokenizer))
        say(f"Scoring {config.eval_samples} samples of each kind.")
        figures = evaluate(pipeline, samples=config.eval_samples)
        say(table(figures))
        result.summary["scores"] = figures
    if jax.process_index() == 0:
        text = json.dumps(result.summary, indent=2) + "\n"
        write_whole(folder / "summary.json", text.encode())
    say(f"Finished at step {result.summary['step']}: {folder}")
    return result


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
    path = out / "samples" / f"step_{step:06d}.png"
    pictures.save_png(path, pictures.grid(snapshots[-1], captions=prompts, scale=2))
    strip = pictures.strip(snapshots[:, :4])
    pictures.save_png(out / "samples" / f"step_{step:06d}_strip.png", strip)
    say(f"Samples: {path}")


def _draw_reconstructions(
    config: Config, state: TrainState, out: epath.Path, say: Callable[[str], None]
) -> None:
    """`samples/step_N.png`: records of the data in the upper rows, what comes back in the lower."""
    count = min(16, len(config.data.source))
    rng = np.random.default_rng(0)
    transform = config.data.transforms
    images = np.stack([transform(config.data.source[i], rng)[0] for i in range(count)])
    model = merge(lambda: config.task.build(nnx.Rngs(0)), state.ema)
    back = pictures.to_uint8(model.decode(model.encode(from_uint8(jnp.asarray(images))).mode()))
    path = out / "samples" / f"step_{int(state.step):06d}.png"
    pictures.save_png(path, pictures.grid(np.concatenate([images, back]), columns=8, scale=2))
    say(f"Reconstructions: {path}")
