"""Compute the loss of a recipe's task on held-out records."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdiff.config.serialization import to_json, types_in
from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.held_out import record_hashes, split_records
from jaxdiff.data.loader import DataConfig, device_batches, host_rows, make_evaluation_dataset
from jaxdiff.data.sources.base import images_of
from jaxdiff.data.sources.cached_latents import CachedLatents, LatentOptions
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh
from jaxdiff.distributed.sharding import replicated
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Losses
from jaxdiff.models.layers import ComputeType, cast
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.training.abstract import host_parts
from jaxdiff.training.initial_weights import load_parts
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.base import Batch, Task, means
from jaxdiff.training.tasks.clip import ClipTask
from jaxdiff.training.tasks.diffusion import DiffusionTask, Trainable

_LARGEST_BATCH = 64  # of a model that is not in training, whose device is unknown


def held_out_metrics(
    config: Config,
    params: PyTree,
    frozen: PyTree,
    tokenizers: Mapping[str, Any],
    mesh: Mesh,
    samples: int,
    *,
    batch_size: int | None = None,
) -> Losses:
    """Return the task's metrics, means over held-out records, with trained and frozen parameters.

    Args:
      config: the recipe.
      params: trained parameters, such as their average.
      frozen: frozen parameters.
      tokenizers: of the text encoders.
      mesh: of the devices that hold the parameters.
      samples: records, rounded to whole batches.
      batch_size: of a batch; that of a micro-batch of the recipe by default.

    Raises:
      UserError: fewer records are held out than a batch.
    """
    # The records of a recipe that caches latents are read from their images here.
    data = dataclasses.replace(config.data, cache=LatentOptions())
    config = dataclasses.replace(config, data=data)
    task, train = _all_levels(config.task), config.train
    batch_size = batch_size or train.batch_size // train.accumulate
    records = held_out_records(data, batch_size)
    batches = max(1, min(samples, len(records)) // batch_size)
    records = records[: batches * batch_size]
    sharding = batch_sharding(mesh)
    dataset = make_evaluation_dataset(
        data,
        task.tokenize(tokenizers),
        [int(index) for index in records],
        batch_size=batch_size,
        rows=host_rows(sharding, batch_size),
    )
    frozen = {name: part for name, part in frozen.items() if name not in host_parts(config)}
    metrics = _jitted(task, train.compute, mesh, len(records))
    totals: dict[str, Any] = {}
    for number, batch in enumerate(device_batches(dataset, sharding, batch_size=batch_size)):
        inputs = {name: x for name, x in batch.items() if name not in ("skipped", "bad")}
        key = jax.random.key(train.seed, impl="threefry2x32")
        rows = number * batch_size + np.arange(batch_size)
        found = jax.device_get(metrics(params, frozen, inputs, key, rows.astype(np.int32)))
        totals = {k: totals.get(k, 0.0) + np.asarray(v, np.float64) for k, v in found.items()}
    return Losses(means(totals, batches), _provenance(config, records, batch_size))


def held_out_records(data: DataConfig, batch_size: int) -> np.ndarray:
    """Return the held-out records of one shape.

    Raises:
      UserError: they are fewer than a batch.
    """
    records = _of_one_shape(data, split_records(data.source, data.held_out)[1])
    if len(records) < batch_size:
        raise UserError(
            f"data.held_out {data.held_out:g} holds out {len(records)} records: expected "
            f"at least a batch, {batch_size}; raise it, or lower the batch size."
        )
    return records


def _provenance(config: Config, records: np.ndarray, batch_size: int) -> dict[str, Any]:
    """Return what a loss depends on: the records, the task and the noise."""
    task, hashes = config.task, record_hashes(config.data.source)[records]
    about: dict[str, Any] = {
        "records": len(records),
        "records_sha256": hashlib.sha256(hashes.tobytes()).hexdigest(),
        "transforms": to_json(config.data.transforms),
        "task": type(task).__name__,
        "seed": config.train.seed,
    }
    if isinstance(task, DiffusionTask):
        about["objective"] = to_json(task.objective)
    if isinstance(task, ClipTask):  # whose loss compares the records of a batch
        about["batch_size"] = batch_size
    return about


def bundle_metrics(
    config: Config, bundle: Bundle, samples: int, *, batch_size: int | None = None
) -> Losses:
    """Return the metrics of a model that is not in training, as `held_out_metrics` does.

    All its parameters count as trained ones, with adapters scaled already. Parts that the loss
    needs beside the model, such as a teacher, are loaded.
    """
    task = config.task
    if isinstance(task, DiffusionTask):
        kept = ("teacher",) if task.objective.uses_teacher else ()
        needed = {path: part for path, part in task.frozen_parts().items() if path[0] in kept}
        task = dataclasses.replace(task, trainable=Trainable(text_encoders=True))
    else:
        needed = task.frozen_parts()
    config = dataclasses.replace(config, task=task)
    constants = load_parts(needed, types_in(config)) | task.constants(bundle.tokenizers)
    own = batch_size or min(_LARGEST_BATCH, config.train.batch_size // config.train.accumulate)
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    tokenizers = bundle.tokenizers
    return held_out_metrics(
        config, bundle.params, constants, tokenizers, mesh, samples, batch_size=own
    )


def _all_levels(task: Task) -> Task:
    """Return a task without the curriculum of noise levels."""
    if isinstance(task, DiffusionTask):
        return dataclasses.replace(task, curriculum=None)
    return task


@functools.lru_cache(maxsize=4)
def _jitted(task: Task, compute: ComputeType, mesh: Mesh, count: int) -> Callable[..., Any]:
    """Return the function from parameters, batch, key and rows of `count` to metrics."""

    def metrics(params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, rows: jax.Array):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            keys = RowKeys(key, rows, count)
            own, fixed = cast(params, compute), cast(frozen, compute)
            return task.loss(own, fixed, batch, keys, task.init_state(), params)[1]

    return jax.jit(metrics, out_shardings=replicated(mesh))


def _of_one_shape(data: DataConfig, records: np.ndarray) -> np.ndarray:
    """Return the records of the most frequent shape, and number of references.

    Only cached latents have several shapes.
    """
    source, references = data.source, data.transforms.references
    if not len(records) or not (references or isinstance(source, CachedLatents)):
        return records
    if isinstance(source, CachedLatents):
        shapes = source.sizes(references)[records]
    else:
        shapes = np.array([_count_images(source, int(index)) for index in records])
    kinds, places, counts = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
    return records[places.reshape(-1) == counts.argmax()] if len(kinds) > 1 else records


def _count_images(source: Any, index: int) -> int:
    """Return the number of images of a record, with references; 0 for an unusable one."""
    try:
        return len(images_of(source[index]))
    except RecordError:
        return 0
