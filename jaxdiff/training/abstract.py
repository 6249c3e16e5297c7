"""Shapes of a recipe's state, frozen parameters and batches, and its FLOPs, without arrays."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import PyTree

from jaxdiff.distributed.sharding import check_mesh
from jaxdiff.models.layers import cast
from jaxdiff.training.ema import Ema
from jaxdiff.training.initial_weights import abstract_frozen_params
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.recipe import Config
from jaxdiff.training.state import TrainState
from jaxdiff.training.step import init_state
from jaxdiff.training.tasks.base import Task
from jaxdiff.training.tasks.diffusion import DiffusionTask


def abstract_state(config: Config) -> TrainState:
    """Return shapes and types of a recipe's train state, without allocating it."""
    return jax.eval_shape(state_initializer(config), {})


def state_initializer(config: Config) -> Callable[[Mapping[str, PyTree]], TrainState]:
    """Return the jitted `init_state` of a recipe, a function of its initial parts."""
    train = config.train
    return _jitted_init(config.task, config.optimizer, train.steps, config.ema, train.seed)


@functools.lru_cache(maxsize=8)
def _jitted_init(
    task: Task, optimizer: AdamW, steps: int, ema: Ema, seed: int
) -> Callable[[Mapping[str, PyTree]], TrainState]:
    updates = optimizer.build(steps)
    return jax.jit(lambda parts: init_state(task, updates, ema, seed, parts))


def host_parts(config: Config) -> frozenset[str]:
    """Return the names of frozen parts that no step reads, which stay on the host.

    These are the text encoders of cached captions.
    """
    task = config.task
    if not isinstance(task, DiffusionTask) or not config.data.gives_text:
        return frozenset()
    unread = task.conditioner.unpacks_alone and not task.objective.uses_uncond
    return frozenset({"text_encoders"} if unread else ())


def abstract_frozen(config: Config) -> PyTree:
    """Return shapes and compute types of the frozen parts on the devices, without reading them."""
    parts, away = abstract_frozen_params(config.task), host_parts(config)
    stored = {name: part for name, part in parts.items() if name not in away}
    stored |= config.task.constants(None)
    return jax.eval_shape(lambda tree: cast(tree, config.train.compute), stored)


def abstract_batch(config: Config) -> dict[str, Any]:
    """Return shapes and types of a batch; with buckets, of the square shape.

    It has as many references as a record may have.
    """
    count, size, task = config.train.batch_size, config.data.transforms.size, config.task
    references = config.data.transforms.references
    batch: dict[str, Any] = {"size_crop": jax.ShapeDtypeStruct((count, 6), jnp.int32)}
    text = task.abstract_text(count)
    if text is not None:
        batch["text"] = text
    if config.data.gives_latents and isinstance(task, DiffusionTask):
        assert task.model.autoencoder is not None
        height, width, _ = task.model.latent_shape(size, size)
        moments = (count, height, width, task.model.autoencoder.moment_channels)
        latents = jax.ShapeDtypeStruct(moments, jnp.float16)
        if config.data.gives_text:
            packed = task.model.conditioner.packed_size
            batch["text_features"] = jax.ShapeDtypeStruct((count, packed), jnp.float16)
        images = {"latents": latents}
    else:
        images = {"image": jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8)}
    if references:
        batch["references"] = (*images.values(),) * references
    return {**images, **batch}


def flops_per_image(config: Config) -> float:
    """Return the FLOPs of one image in a training step, without those of cached features.

    It has as many references as a record may have.
    """
    data, count = config.data, config.data.transforms.references
    options: dict[str, Any] = {"references": count} if count else {}
    return config.task.flops_per_image(
        data.transforms.size, latents=data.gives_latents, text=data.gives_text, **options
    )


def check_axes(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raise `UserError` for a mesh axis that shards nothing of a recipe's model."""
    task, shape = config.task, mesh.shape
    if shape["fsdp"] == shape["tensor"] == shape["context"] == 1:
        return
    params = {"trained": abstract_state(config).params, "frozen": abstract_frozen(config)}
    check_mesh(params, task.param_axes(), mesh, splits_tokens=task.splits_tokens)
