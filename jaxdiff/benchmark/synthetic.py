"""Weights and batches of the right shapes, drawn at random: speed does not depend on their values.

So any recipe can be timed with no weights, no data and no network.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.distributed.mesh import batch_sharding
from jaxdiff.distributed.sharding import state_shardings
from jaxdiff.planning.plan import abstract_batch
from jaxdiff.pretrained.bundle import Bundle, abstract_of
from jaxdiff.training.loop import abstract_frozen, abstract_state
from jaxdiff.training.recipe import Config
from jaxdiff.training.state import TrainState
from jaxdiff.training.step import init_state

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
    shardings = state_shardings(abstract_state(config), mesh, config.task.param_axes())
    optimizer = config.optimizer.build(config.train.steps)

    def init() -> TrainState:
        return init_state(config.task, optimizer, config.ema, config.train.seed)

    return jax.jit(init, out_shardings=shardings)(), shardings


def frozen_parts(config: Config, mesh: Mesh) -> PyTree:
    """The frozen parts of a recipe, in the type that it computes in."""
    abstract = abstract_frozen(config)
    shardings = state_shardings(abstract, mesh, config.task.param_axes())
    return jax.device_put(random_like(abstract), shardings)


def batch(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return one batch on the devices: random pixels and token ids, images taken as uncropped."""
    rng, size = np.random.default_rng(config.train.seed), config.data.transforms.size

    def random(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if name == "size_crop":
            return np.tile(np.array([size, size, 0, 0, size, size], leaf.dtype), (leaf.shape[0], 1))
        if leaf.dtype == bool:
            return np.zeros(leaf.shape, bool)
        if np.issubdtype(leaf.dtype, np.integer):
            below = 256 if name == "image" else config.tokenizer.vocab_size
            return rng.integers(0, below, leaf.shape, leaf.dtype)
        return rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)

    host = {
        name: jax.tree.map(functools.partial(random, name), leaves)
        for name, leaves in abstract_batch(config).items()
    }
    return jax.device_put(host, batch_sharding(mesh))


def tokenizer_of(config: Config) -> Tokenizer:
    """Return a tokenizer of the recipe's length, trained on next to nothing."""
    wanted = config.tokenizer
    return Tokenizer.train(
        ["a small green pea"], vocab_size=wanted.vocab_size, length=wanted.length
    )


def tokenizers(config: Config) -> dict[str, Tokenizer]:
    """Return such a tokenizer for each text encoder."""
    return dict.fromkeys(config.task.text_encoder_names, tokenizer_of(config))


def bundle(config: Config) -> Bundle:
    """Return the model of a recipe with random weights."""
    model = config.task.model
    return Bundle(model, random_like(abstract_of(model)), tokenizers(config))
