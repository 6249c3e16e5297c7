"""Weights and batches of the right shapes, drawn at random: speed does not depend on their values.

So any recipe can be timed with no weights, no data and no network.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdiff.config import Config
from jaxdiff.data.cached_latents import CachedLatents
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.model import Bundle
from jaxdiff.models.clip import ClipTextConfig
from jaxdiff.models.layers import abstract_params, any_rngs
from jaxdiff.parallel.mesh import batch_sharding
from jaxdiff.parallel.sharding import state_shardings
from jaxdiff.training.clip import ClipTask
from jaxdiff.training.diffusion import DiffusionTask
from jaxdiff.training.loop import abstract_state
from jaxdiff.training.state import TrainState
from jaxdiff.training.step import cast, init_state

_SCALE = 0.02


def random_like(abstract: PyTree, seed: int = 0) -> PyTree:
    """Arrays of the host with the shapes and types of those in a tree, small and normal."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> np.ndarray:
        values = _SCALE * np.asarray(rng.standard_normal(leaf.shape, np.float32))
        return np.asarray(values, leaf.dtype)

    return jax.tree.map(draw, abstract)


def fresh_state(config: Config, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """The train state of a recipe at step 0, all of it as drawn, and its shardings."""
    shardings = state_shardings(abstract_state(config), mesh)
    optimizer = config.optimizer.build(config.train.steps)

    def init() -> TrainState:
        return init_state(config.task, optimizer, config.ema, config.train.seed)

    return jax.jit(init, out_shardings=shardings)(), shardings


def frozen_parts(config: Config, mesh: Mesh) -> PyTree:
    """The frozen parts of a recipe, in the type that it computes in."""
    parts = {name: abstract_params(part.build) for name, part in config.task.frozen().items()}
    host = random_like(parts)
    return jax.device_put(cast(host, config.train.compute), state_shardings(host, mesh))


def text_config(config: Config) -> ClipTextConfig | None:
    """The text encoder that a recipe's prompts must fit; None where the task reads none."""
    match config.task:
        case DiffusionTask() as task:
            return task.text.model
        case ClipTask() as task:
            return task.model.text
    return None


def batch(config: Config, mesh: Mesh) -> dict[str, jax.Array]:
    """One batch on the devices: pixels and words at random, images taken to be whole."""
    rng = np.random.default_rng(config.train.seed)
    count, size = config.train.batch_size, config.data.transforms.size
    text = text_config(config)
    length = text.length if text else config.tokenizer.length
    vocab_size = text.vocab_size if text else config.tokenizer.vocab_size
    host = {
        **_pixels_or_latents(config, rng, (count, size, size)),
        "tokens": rng.integers(0, vocab_size, (count, length), np.int32),
        "framing": np.tile(np.array([size, size, 0, 0, size, size], np.int32), (count, 1)),
    }
    return jax.device_put(host, batch_sharding(mesh))


def _pixels_or_latents(
    config: Config, rng: np.random.Generator, shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """What a batch of the recipe's data has of images, of the shape [b, h, w]."""
    task = config.task
    if not isinstance(config.data.source, CachedLatents):
        return {"image": rng.integers(0, 256, (*shape, 3), np.uint8)}
    assert isinstance(task, DiffusionTask)
    height, width, channels = task.shape(*shape[1:])
    moments = rng.standard_normal((shape[0], height, width, 2 * channels), np.float32)
    return {"latents": moments.astype(np.float16)}


def tokenizer(config: Config) -> Tokenizer:
    """One that fits the recipe's text encoder, trained on next to nothing."""
    text = text_config(config)
    length, vocab_size = (
        (text.length, text.vocab_size)
        if text
        else (config.tokenizer.length, config.tokenizer.vocab_size)
    )
    return Tokenizer.train(["a small green pea"], vocab_size=vocab_size, length=length)


def bundle(config: Config) -> Bundle:
    """A model of a recipe as if trained."""
    task: Any = config.task
    params = random_like(abstract_params(lambda: task.build(any_rngs())))
    parts = {name: abstract_params(part.build) for name, part in task.frozen().items()}
    return Bundle(config, params, random_like(parts, seed=1), tokenizer(config))
