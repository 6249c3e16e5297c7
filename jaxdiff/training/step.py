"""The training step: a pure function of (state, frozen, batch); the caller shards it."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, Shaped

from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.distributed.sharding import (
    OfRows,
    Reduction,
    mean_over_replicas,
    mean_over_slices,
    shard_gradients,
    whole_on_each_cpu,
)
from jaxdiff.models.layers import ComputeType, cast, rngs_from_seed
from jaxdiff.models.text_to_image import merge_params
from jaxdiff.training.ema import Ema
from jaxdiff.training.state import TrainState, no_skips
from jaxdiff.training.tasks.base import Batch, Metrics, Task

TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]


def init_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    ema: Ema,
    seed: int,
    initial_params: Mapping[str, PyTree] = MappingProxyType({}),
) -> TrainState:
    """Return the state at step 0; call it under `jax.eval_shape`, or jitted with shardings.

    `initial_params` replace initialised parameters at the same paths.
    """
    params = merge_params(task.init_params(rngs_from_seed(seed)), initial_params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(seed, impl="threefry2x32"),
        params=params,
        ema=ema.init(params),
        averages=ema.post_hoc.init(params) if ema.post_hoc else {},
        opt_state=optimizer.init(params),
        task_state=task.init_state(),
        nonfinite=no_skips(),
    )


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    ema: Ema,
    *,
    accumulate: int = 1,
    compute: ComputeType = "float32",
    reduce: Reduction = "compute",
) -> TrainStep:
    """Make a step that updates parameters, optimizer state, EMA and the task's state.

    Gradients are taken with respect to the float32 masters through a cast to `compute`, and
    averaged over `accumulate` sequential micro-batches: the gradient of the whole batch where the
    loss is a mean over its rows. Replicas of the model sum them as `reduce` states. A nonfinite
    loss, gradient or update changes only the step and the counts of skipped updates.
    """

    def loss(params, frozen, batch, keys, task_state, average):
        params, frozen = cast(params, compute), cast(frozen, compute)
        with jax.named_scope("loss"):
            value, metrics, task_state = task.loss(params, frozen, batch, keys, task_state, average)
        return value, (metrics, task_state)

    def gradient(*inputs):
        grads, aux = jax.grad(loss, has_aux=True)(*inputs)
        return shard_gradients(grads, task.param_axes()), aux

    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        keys = RowKeys.whole(key, len(jax.tree.leaves(batch)[0]))
        # In float32. On CPUs also for one part: XLA would reduce the gradients of each block on its
        # own, and the devices wait for each other each time.
        once = accumulate > 1 or reduce == "float32" or whole_on_each_cpu()
        averaged = functools.partial(_averaged, task=task, once=once, compute=compute)
        grads, (metrics, task_state) = _mean_gradient(
            gradient, accumulate, averaged, state, frozen, batch, keys
        )
        grad_norm = optax.tree.norm(grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope("ema"):
            average = ema.update(state.ema, params, state.step)
        changed = {
            "params": params,
            "opt_state": opt_state,
            "ema": average,
            "task_state": task.next_state(task_state, metrics),
        }
        # The updates are finite where the new parameters are. XLA would compute the updates twice
        # for their own norm (1.4 times the step on a CPU), and compile four times as long for the
        # norms of the whole state.
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        finite &= jnp.isfinite(optax.tree.norm(params))
        kept = {name: getattr(state, name) for name in changed}
        changed = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        if ema.post_hoc:  # a skipped update is a step of unchanged parameters
            with jax.named_scope("ema"):
                changed["averages"] = ema.post_hoc.update(
                    state.averages, changed["params"], state.step
                )
        nonfinite = {
            "in_a_row": jnp.where(finite, 0, state.nonfinite["in_a_row"] + 1),
            "total": state.nonfinite["total"] + ~finite,
        }
        metrics |= {"grad_norm": grad_norm, "nonfinite_in_a_row": nonfinite["in_a_row"]}
        metrics["nonfinite"] = nonfinite["total"]
        return state.replace(step=state.step + 1, nonfinite=nonfinite, **changed), metrics

    return train_step


def _averaged(function: OfRows, *, task: Task, once: bool, compute: ComputeType) -> OfRows:
    """Average what replicas of the model, or else slices, compute of their rows.

    Within a replica or a slice XLA reduces gradients for each micro-batch, in the compute type.
    """
    if not task.by_row:
        return function
    if once:
        return mean_over_replicas(function)
    return mean_over_slices(function, task.param_axes(), compute)


def _mean_gradient(
    gradient: Callable[..., tuple[PyTree, tuple[Metrics, PyTree]]],
    accumulate: int,
    averaged: Callable[[OfRows], OfRows],
    state: TrainState,
    frozen: PyTree,
    batch: Batch,
    keys: RowKeys,
) -> tuple[PyTree, tuple[Metrics, PyTree]]:
    """Return mean gradient and metrics over equal parts of the batch, and the last task state.

    `averaged` makes a function of rows one of the whole batch: each replica of the model, or each
    slice, calls it with its own rows.
    """

    def split(x: Array) -> Shaped[Array, "k b ..."]:
        # Every k-th image: each device holds rows of every micro-batch, without communication.
        return jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)

    def mean_over_parts(constants, rows):
        params, frozen, key, first_state, ema = constants

        def part_gradient(part, task_state):
            batch, indices = part
            part_keys = RowKeys(key, indices, keys.count)
            grads, (metrics, task_state) = gradient(
                params, frozen, batch, part_keys, task_state, ema
            )
            return (grads, metrics), task_state

        if accumulate == 1:
            return part_gradient(rows, first_state)

        def body(carry, part):
            total, task_state = carry
            result, task_state = part_gradient(part, task_state)
            return (jax.tree.map(jnp.add, total, result), task_state), None

        parts = jax.tree.map(split, rows)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes, _ = jax.eval_shape(part_gradient, first, first_state)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (total, task_state), _ = jax.lax.scan(body, (zeros, first_state), parts)
        return jax.tree.map(lambda x: x / accumulate, total), task_state

    constants = (state.params, frozen, keys.key, state.task_state, state.ema)
    (grads, metrics), task_state = averaged(mean_over_parts)(constants, (dict(batch), keys.rows))
    return grads, (metrics, task_state)
