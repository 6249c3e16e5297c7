"""The training step: a pure function of (state, frozen, batch), sharded from outside."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from jaxdiff.models.layers import bind_init, graph, rngs_from_seed
from jaxdiff.training.ema import Ema
from jaxdiff.training.state import TrainState, no_skips
from jaxdiff.training.tasks.base import Batch, Metrics, Task

ComputeType = Literal["float32", "bfloat16"]
TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]


def structure(task: Task) -> Any:
    """The graph of a task's module without its parameters; nothing is allocated."""
    return graph(bind_init(type(task).build, task))


def init_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    ema: Ema,
    seed: int,
    start: Mapping[str, PyTree] = MappingProxyType({}),
) -> TrainState:
    """The state of a run at step 0. Call it under `jax.eval_shape`, or jitted with shardings.

    `start` has the weights of the parts that do not start as drawn, by their name in the module.
    """
    params = nnx.to_pure_dict(nnx.split(task.build(rngs_from_seed(seed)))[1]) | dict(start)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(seed, impl="threefry2x32"),
        params=params,
        ema=ema.init(params),
        opt_state=optimizer.init(params),
        task_state=task.init_state(),
        nonfinite=no_skips(),
    )


def cast(tree: PyTree, compute: ComputeType) -> PyTree:
    """Floating arrays in the type that a model computes in: a module takes that of its weights.

    Scalars stay as they are: of CLIP's logarithmic temperature bfloat16 would leave steps of 2 %.
    """

    def convert(leaf):
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(compute) if is_float and leaf.ndim and leaf.dtype != compute else leaf

    return jax.tree.map(convert, tree)


def make_train_step(
    task: Task,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    ema: Ema,
    *,
    accumulate: int = 1,
    compute: ComputeType = "float32",
) -> TrainStep:
    """One update: gradients, optimizer, moving average, and what the task carries along.

    Gradients are taken with respect to the float32 masters through a cast to `compute`. With
    `accumulate` = k they are averaged over k micro-batches, one after the other. An update whose
    loss or gradient is not finite changes nothing but the step and the counts of such updates.
    """

    def loss(params, frozen, batch, key, task_state):
        model = nnx.merge(graphdef, cast(params, compute))
        return task.loss(model, cast(frozen, compute), batch, key, task_state)

    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, metrics = _mean_gradient(
            jax.grad(loss, has_aux=True), accumulate, state, frozen, batch, key
        )
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        changed = {
            "params": params,
            "opt_state": opt_state,
            "ema": ema.update(state.ema, params, state.step),
            "task_state": task.next_state(state.task_state, metrics),
        }
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        kept = {name: getattr(state, name) for name in changed}
        changed = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        nonfinite = {
            "in_a_row": jnp.where(finite, 0, state.nonfinite["in_a_row"] + 1),
            "total": state.nonfinite["total"] + ~finite,
        }
        metrics |= {"grad_norm": grad_norm, "nonfinite_in_a_row": nonfinite["in_a_row"]}
        metrics["nonfinite"] = nonfinite["total"]
        return state.replace(step=state.step + 1, nonfinite=nonfinite, **changed), metrics

    return train_step


def _mean_gradient(
    gradient: Callable[..., tuple[PyTree, Metrics]],
    accumulate: int,
    state: TrainState,
    frozen: PyTree,
    batch: Batch,
    key: jax.Array,
) -> tuple[PyTree, Metrics]:
    """Mean gradient and metrics over `accumulate` equal parts of the batch."""
    if accumulate == 1:
        return gradient(state.params, frozen, batch, key, state.task_state)

    def part(x: Array) -> Float[Array, "k b ..."]:
        # Every k-th image, so that each device has its share of every part without an exchange.
        return jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)

    def body(total, inputs):
        index, part = inputs
        result = gradient(
            state.params, frozen, part, jax.random.fold_in(key, index), state.task_state
        )
        return jax.tree.map(jnp.add, total, result), None

    parts = (jnp.arange(accumulate), jax.tree.map(part, dict(batch)))
    shapes = jax.eval_shape(
        gradient,
        state.params,
        frozen,
        jax.tree.map(lambda x: x[0], parts[1]),
        key,
        state.task_state,
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, parts)
    return jax.tree.map(lambda x: x / accumulate, total)
