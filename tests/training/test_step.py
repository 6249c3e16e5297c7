"""One training step, on a task whose loss is deterministic."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh
from jaxdiff.distributed.sharding import replicated, state_shardings
from jaxdiff.models.layers import (
    FROM_MLP,
    TO_MLP,
    Dense,
    bind_init,
    bind_params,
    cast,
    init_params,
    param_axes,
    scan_blocks,
    stack_blocks,
)
from jaxdiff.planning.collectives import exchanges
from jaxdiff.planning.hlo import read_program
from jaxdiff.training.ema import Ema
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.step import init_state, make_train_step
from jaxdiff.training.tasks.base import Task

WIDTH, BATCH = 64, 32
OPTIMIZER = AdamW(learning_rate=1e-2, eps=1e-4).build(100)
EMA = Ema(decay=0.5)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = Dense(WIDTH, 2 * WIDTH, axes=TO_MLP, rngs=rngs)
        self.down = Dense(2 * WIDTH, WIDTH, axes=FROM_MLP, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = stack_blocks(Block, 2, rngs)
        self.scale = nnx.Param(jnp.ones(1))

    def __call__(self, x):
        x, _ = scan_blocks(self.blocks, x[:, None], lambda block, h: block(h))
        return self.scale[...] * x[:, 0]


def build(*, rngs) -> Network:
    return Network(rngs)


class Regression(Task):
    """Mean squared error; carries the number of its steps along.

    A batch whose `root` is 0 has a finite loss whose gradient is not.
    """

    def __init__(self, seen: list | None = None):
        self.model = None
        self.seen = seen if seen is not None else []

    def init_params(self, rngs):
        return init_params(Network, rngs)

    def flops_per_image(self, size, *, latents=False, text=False):
        return 0.0

    by_row = True

    def param_axes(self):
        return param_axes(bind_init(build))

    def init_state(self):
        return {"steps": jnp.zeros((), jnp.int32)}

    def loss(self, params, frozen, batch, keys, task_state, ema):
        self.seen.append({leaf.dtype.name for leaf in jax.tree.leaves(params)})
        model = bind_params(bind_init(build), params)
        x = batch["image"].astype(model.scale[...].dtype)
        error = (model(x) - batch["target"]).astype(jnp.float32)
        root = jnp.sqrt(jnp.abs(model.scale[...] * batch["root"])).astype(jnp.float32)
        loss = jnp.mean(error**2) + 0 * jnp.mean(root)
        return loss, {"loss": loss, "root": jnp.mean(root)}, task_state

    def next_state(self, task_state, metrics):
        return {"steps": task_state["steps"] + 1}


@functools.cache
def initial():
    return jax.device_get(jax.jit(lambda: init_state(Regression(), OPTIMIZER, EMA, 0))())


def make_batch(**changes):
    rng = np.random.default_rng(0)
    batch = {
        name: rng.normal(size=(BATCH, WIDTH)).astype(np.float32) for name in ("image", "target")
    }
    return batch | {"root": np.ones(BATCH, np.float32)} | changes


@functools.cache
def compiled(mesh_config: MeshConfig | None = None, **options):
    """The jitted step on a mesh, None for a single device, and how to place a state and a batch."""
    mesh = make_mesh(mesh_config or MeshConfig(), jax.devices()[: 8 if mesh_config else 1])
    placed = state_shardings(initial(), mesh, param_axes(bind_init(build)))
    step_on_mesh = make_train_step(Regression(), OPTIMIZER, EMA, **options)

    def step(*inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step_on_mesh(*inputs)

    step = jax.jit(
        step,
        in_shardings=(placed, replicated(mesh), batch_sharding(mesh)),
        out_shardings=(placed, replicated(mesh)),
    )

    def run(state, batch):
        return step(jax.device_put(state, placed), {}, jax.device_put(batch, batch_sharding(mesh)))

    run.step = step
    return run


def two_steps(run):
    state, first = run(initial(), make_batch())
    state, second = run(state, make_batch(image=make_batch()["target"]))
    return state, [float(m[k]) for m in (first, second) for k in ("loss", "grad_norm")]


@functools.cache
def on_one_device():
    return two_steps(compiled())


MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=2, fsdp=4),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, tensor=8),
    MeshConfig(slices=2, data=2, fsdp=2),
]


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        *((mesh, {}) for mesh in MESHES),
        (None, {"accumulate": 4}),
        *((mesh, {"accumulate": 2}) for mesh in MESHES if mesh.tensor < 8),
        *((mesh, {"reduce": "float32"}) for mesh in (MESHES[0], MESHES[1], MESHES[5])),
    ],
)
def test_devices_and_micro_batches_do_not_change_the_step(mesh, options):
    expected, figures = on_one_device()
    state, found = two_steps(compiled(mesh, **options))
    np.testing.assert_allclose(found, figures, rtol=1e-5)
    assert not np.isclose(figures[0], figures[2], rtol=1e-2)
    for name in ("params", "ema", "opt_state", "task_state", "step"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            getattr(state, name),
            getattr(expected, name),
        )


@pytest.mark.parametrize(("reduce", "types"), [("compute", set()), ("float32", {"f32"})])
def test_replicas_sum_gradients_once_in_float32_if_the_recipe_says_so(reduce, types):
    """Otherwise the compiler sums results of products, in their type."""
    found = summed(MeshConfig(data=2, fsdp=4), reduce)
    assert {kind for _, kind in found} == types
    assert not found or len(found) >= len(jax.tree.leaves(initial().params))


def test_slices_sum_gradients_once_each_device_a_part_in_the_compute_type():
    """Half of the rows of a kernel, in eights, with two replicas in a slice; biases are whole."""
    found = [size for size, kind in summed(MeshConfig(slices=2, data=2, fsdp=2)) if kind == "bf16"]
    up = initial().params["blocks"]["up"]
    layers, width, hidden = up["kernel"].shape
    rows = math.ceil(layers * width / 16) * 8
    assert rows * hidden // 2 in found  # `fsdp` splits the hidden units
    assert len(found) == len(jax.tree.leaves(initial().params))


def summed(mesh_config, reduce="compute"):
    """Return size and type of each sum of the program that is not the compiler's."""
    mesh = make_mesh(mesh_config)
    step_on_mesh = make_train_step(Regression(), OPTIMIZER, EMA, compute="bfloat16", reduce=reduce)

    def step(*inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step_on_mesh(*inputs)

    placed = replicated(mesh), replicated(mesh), batch_sharding(mesh)
    program = jax.jit(step, in_shardings=placed).lower(initial(), {}, make_batch()).as_text()
    arrays = r"stablehlo\.all_reduce.*?: \(tensor<((?:\d+x)*)(\w+)>"
    found = re.findall(arrays, program, re.DOTALL)
    return [(math.prod(map(int, shape.split("x")[:-1])), kind) for shape, kind in found]


@pytest.mark.parametrize("mesh", [MESHES[0], MeshConfig(slices=2, data=4)])
def test_cpu_devices_that_hold_the_whole_model_wait_for_each_other_once(mesh):
    program = compiled(mesh, accumulate=1).step.lower(initial(), {}, make_batch()).compile()
    (exchange,) = exchanges(read_program(program.as_text()))
    assert exchange[:3] == ("all-reduce", 8, 1)
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(initial().params))
    assert weights <= exchange.payload <= weights + 64


@pytest.mark.parametrize(
    ("mesh", "up", "parts"),
    [
        (MESHES[1], (None, None, "fsdp"), 4),
        (MESHES[3], (None, "fsdp", "tensor"), 4),
        (MESHES[4], (None, None, "tensor"), 8),
    ],
)
def test_parameters_moments_and_average_are_really_split(mesh, up, parts):
    state, _ = compiled(mesh, accumulate=1)(initial(), make_batch())
    adam = state.opt_state[1][0]
    for tree in (state.params, state.ema, adam.mu, adam.nu):
        kernel = tree["blocks"]["up"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec(*up)
        held = {shard.data.nbytes for shard in kernel.addressable_shards}
        assert held == {kernel.nbytes // parts}


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


BAD = {
    "loss": {"image": np.full((BATCH, WIDTH), np.nan, np.float32)},
    "gradient": {"root": np.zeros(BATCH, np.float32)},
}


@pytest.mark.parametrize("where", BAD)
def test_an_update_that_is_not_finite_is_skipped_and_counted(where):
    run = compiled()
    before, _ = run(initial(), make_batch())
    state, metrics = run(before, make_batch(**BAD[where]))
    assert np.isfinite(metrics["loss"]) == (where == "gradient")
    assert not np.isfinite(metrics["grad_norm"])
    for name in ("params", "ema", "opt_state", "task_state"):
        assert same_bits(getattr(state, name), getattr(before, name))
    assert int(state.step) == 2
    state, metrics = run(state, make_batch(**BAD[where]))
    assert (int(metrics["nonfinite_in_a_row"]), int(metrics["nonfinite"])) == (2, 2)

    state, metrics = run(state, make_batch())
    assert (int(metrics["nonfinite_in_a_row"]), int(metrics["nonfinite"])) == (0, 2)
    assert jax.device_get(state.nonfinite) == {"in_a_row": 0, "total": 2}
    assert int(state.task_state["steps"]) == 2
    assert not same_bits(state.params, before.params)


def test_an_update_that_overflows_is_skipped_and_counted():
    overflows = optax.chain(OPTIMIZER, optax.scale(1e38), optax.scale(1e38))
    task = Regression()
    state = jax.jit(lambda: init_state(task, overflows, EMA, 0))()
    before = jax.device_get(state)
    run = jax.jit(make_train_step(task, overflows, EMA))
    for count in (1, 2):
        state, metrics = run(state, {}, make_batch())
        assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
        assert (int(metrics["nonfinite"]), int(metrics["nonfinite_in_a_row"])) == (count, count)
        for name in ("params", "ema", "opt_state", "task_state"):
            assert same_bits(getattr(state, name), getattr(before, name))


def test_one_bad_micro_batch_skips_the_whole_update():
    root = np.ones(BATCH, np.float32)
    root[5] = 0
    run = compiled(None, accumulate=4)
    state, metrics = run(initial(), make_batch(root=root))
    assert int(metrics["nonfinite"]) == 1
    assert same_bits(state.params, initial().params)


@functools.cache
def in_bfloat16():
    """A small step from the start, its metrics, and the types of weights that the loss saw."""
    optimizer = AdamW(learning_rate=1e-5, weight_decay=0.0).build(100)
    task = Regression(seen=[])
    start = initial().replace(opt_state=optimizer.init(initial().params))
    step = make_train_step(task, optimizer, EMA, compute="bfloat16")
    return *jax.jit(step)(start, {}, make_batch()), task.seen


def test_bfloat16_computes_on_copies_of_float32_masters():
    state, metrics, seen = in_bfloat16()
    assert seen
    assert all(types == {"bfloat16"} for types in seen)
    leaves = jax.tree.leaves((state.params, state.ema, state.opt_state))
    floats = {leaf.dtype.name for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floats == {"float32"}
    loss = float(compiled()(initial(), make_batch())[1]["loss"])
    assert float(metrics["loss"]) == pytest.approx(loss, rel=2e-2)
    assert float(metrics["loss"]) != loss


def test_an_update_too_small_for_bfloat16_reaches_the_masters():
    state, _, _ = in_bfloat16()
    moved = float(state.params["scale"][0]) - 1
    assert 0 < abs(moved) < 2**-9  # half of the distance from 1 to the next bfloat16


def test_scalars_are_not_rounded():
    tree = cast({"log": jnp.float32(3.3), "kernel": jnp.ones(2)}, "bfloat16")
    assert tree["log"].dtype == jnp.float32
    assert tree["kernel"].dtype == jnp.bfloat16
