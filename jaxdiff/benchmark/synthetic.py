"""Random weights and batches of the right shapes: speed does not depend on their values.

Any recipe can be timed without trained weights, data or network access.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.distributed.mesh import batch_sharding
from jaxdiff.distributed.sharding import state_shardings
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.training.abstract import abstract_batch, abstract_frozen, abstract_state
from jaxdiff.training.recipe import Config
from jaxdiff.training.state import TrainState
from jaxdiff.training.step import init_state

_SCALE = 0.02


def random_like(abstract: PyTree, seed: int = 0) -> PyTree:
    """Return small normal NumPy arrays with the shapes and types of a tree."""
    rng = np.random.default_rng(seed)

    def sample(leaf: Any) -> np.ndarray:
        values = _SCALE * np.asarray(rng.standard_normal(leaf.shape, np.float32))
        return np.asarray(values, leaf.dtype)

    return jax.tree.map(sample, abstract)


def initial_state(config: Config, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """Return a recipe's initialised train state, and its shardings."""
    shardings = state_shardings(abstract_state(config), mesh, config.task.param_axes())
    optimizer = config.optimizer.build(config.train.steps)

    def init() -> TrainState:
        return init_state(config.task, optimizer, config.ema, config.train.seed)

    return jax.jit(init, out_shardings=shardings)(), shardings


def random_frozen(config: Config, mesh: Mesh) -> PyTree:
    """Return random weights for a recipe's frozen parts, in its compute type."""
    abstract = abstract_frozen(config)
    shardings = state_shardings(abstract, mesh, config.task.param_axes())
    return jax.device_put(random_like(abstract), shardings)


def random_batch(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return a batch on the devices: random pixels and token ids, uncropped images."""
    rng, size = np.random.default_rng(config.train.seed), config.data.transforms.size

    def sample(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if name == "size_crop":
            return np.tile(np.array([size, size, 0, 0, size, size], leaf.dtype), (leaf.shape[0], 1))
        if leaf.dtype == bool:  # masks [b, n] hide no token, and no prompt [b] is absent
            return np.full(leaf.shape, leaf.ndim > 1)
        if np.issubdtype(leaf.dtype, np.integer):
            below = 256 if leaf.dtype == np.uint8 else config.tokenizer.vocab_size
            return rng.integers(0, below, leaf.shape, leaf.dtype)
        return rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)

    host = {
        name: jax.tree.map(functools.partial(sample, name), leaves)
        for name, leaves in abstract_batch(config).items()
    }
    return jax.device_put(host, batch_sharding(mesh))


def small_tokenizers(config: Config) -> Mapping[str, TextTokenizer]:
    """Return tokenizers of the recipe's length, trained on one caption."""
    conditioner, size = config.task.conditioner, config.tokenizer
    if conditioner is None:
        return {}
    return conditioner.train_tokenizers(
        ["a small green pea"], vocab_size=size.vocab_size, length=size.length
    )


def random_bundle(config: Config) -> Bundle:
    """Return a recipe's text-to-image model with random weights, whose activations stay of order 1.

    Scales are 1 and biases 0; kernels have a variance of 1 / fan-in.
    """
    model, rng = config.task.model, np.random.default_rng(0)
    assert isinstance(model, TextToImage)

    def sample(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name = getattr(path[-1], "key", "")
        if name in ("scale", "bias"):
            return np.full(leaf.shape, float(name == "scale"), np.float32)
        fan_in = np.prod(leaf.shape[-4:-1] if leaf.ndim == 4 else leaf.shape[-2:-1])
        values = rng.standard_normal(leaf.shape, np.float32)
        return values * np.float32(fan_in**-0.5 if name == "kernel" else _SCALE)

    params = jax.tree_util.tree_map_with_path(sample, model.abstract_params())
    return Bundle(model, params, small_tokenizers(config))
