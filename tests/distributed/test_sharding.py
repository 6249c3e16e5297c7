"""Where the rules put arrays, and that a step is the same wherever they lie."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh
from jaxdiff.distributed.sharding import (
    gather_weights,
    partition_spec,
    split_tokens,
    state_shardings,
)
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import TextInputs
from jaxdiff.training.abstract import abstract_state
from jaxdiff.training.ema import Ema
from jaxdiff.training.loop import compile_step
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.step import init_state

MESH = MeshConfig(data=2, fsdp=2, tensor=2)
ROWS = MeshConfig(data=2, fsdp=2, context=2)
# Adam divides by the root of squared gradients: where these are rounding errors, eps says so.
OPTIMIZER = AdamW(learning_rate=1e-2, eps=1e-4, clip_norm=None)


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        # Outputs of the first product split, inputs of the second: one exchange for the pair.
        (".blocks.attention.q.kernel", (6, 256, 256), (None, "fsdp", "tensor")),
        (".blocks.attention.out.kernel", (6, 256, 256), (None, "tensor", "fsdp")),
        (".blocks.mlp.down.kernel", (6, 704, 256), (None, "tensor", "fsdp")),
        (".blocks.mlp_in.kernel", (6, 256, 1024), (None, "fsdp", "tensor")),
        (".blocks.mlp_out.kernel", (6, 1024, 256), (None, "tensor", "fsdp")),
        # The blocks of a list are not stacked.
        (".down.0.blocks.1.modulation.kernel", (512, 128), ("fsdp", None)),
        # What has no place on tensor is split over fsdp along its longest axis.
        (".embedding", (1024, 128), ("fsdp", None)),
        (".decoder.conv.kernel", (3, 3, 64, 128), (None, None, None, "fsdp")),
        # The depth that the scan runs over is never split, however well it divides.
        (".blocks.modulation.kernel", (512, 64, 64), (None, "fsdp", None)),
        # Whole: vectors, stacked or not, what is small, and what no axis divides.
        (".blocks.q.bias", (6, 4096), ()),
        (".norm.scale", (4096,), ()),
        (".patch.kernel", (48, 32), (None, None)),
        (".odd.kernel", (91, 93), (None, None)),
    ],
)
def test_a_place_follows_from_name_and_shape(name, shape, spec):
    assert partition_spec(name, shape, make_mesh(MESH)) == PartitionSpec(*spec)


@functools.cache
def small(recipe):
    """The tiny recipe with one block, and its state with weights away from zero."""
    config = recipe(steps=10)
    model = config.task.model
    denoiser = dataclasses.replace(model.denoiser, depth=1, width=64)
    task = dataclasses.replace(config.task, model=dataclasses.replace(model, denoiser=denoiser))
    config = dataclasses.replace(config, task=task, optimizer=OPTIMIZER, ema=Ema(decay=0.5))
    state = jax.jit(lambda: init_state(task, OPTIMIZER.build(10), config.ema, 0))()
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.05 * rng.normal(size=p.shape).astype(p.dtype), state.params
    )
    return config, jax.device_get(dataclasses.replace(state, params=params))


@functools.cache
def after_two_steps(recipe, mesh_config):
    """State and metrics, as they lie on the mesh; None is a single device."""
    config, state = small(recipe)
    devices = jax.devices()[: 1 if mesh_config is None else 8]
    mesh = make_mesh(mesh_config or MeshConfig(), devices)
    shardings = state_shardings(abstract_state(config), mesh)
    step = compile_step(config, mesh, shardings, {})
    rng = np.random.default_rng(1)
    batch = {
        "image": rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
        "text": TextInputs({"text": rng.integers(0, 600, (8, 16), np.int32)}, np.zeros(8, bool)),
        "size_crop": np.zeros((8, 6), np.int32),
    }
    batch = jax.device_put(batch, batch_sharding(mesh))
    # Its key stays on the device, where a step would delete it.
    key = jax.random.clone(state.key)
    state = jax.device_put(state.replace(key=key), shardings)
    losses = []
    for _ in range(2):
        state, metrics = step(state, {}, batch)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return state, losses


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MESH, ROWS], ids=["tensor", "context"])
def test_a_step_of_the_real_task_is_that_of_one_device(tiny_recipe, mesh):
    one, losses = after_two_steps(tiny_recipe, None)
    eight, sharded_losses = after_two_steps(tiny_recipe, mesh)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-4)
    assert losses[1] != losses[0]
    for name in ("params", "ema", "opt_state", "task_state"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4),
            getattr(eight, name),
            getattr(one, name),
        )


@pytest.mark.slow
def test_moments_and_average_lie_where_their_parameters_lie(tiny_recipe):
    state, _ = after_two_steps(tiny_recipe, MESH)
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
    specs = jax.tree.map(lambda x: x.sharding.spec, state.params)
    for tree in (state.ema, adam.mu, adam.nu):
        assert jax.tree.map(lambda x: x.sharding.spec, tree) == specs
    kernel = adam.mu["denoiser"]["blocks"]["attention"]["q"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert {shard.data.nbytes for shard in kernel.addressable_shards} == {kernel.nbytes // 4}


def test_rows_of_a_picture_are_shared_out_over_context():
    """Where each device has two images of four, and two of their eight rows."""
    mesh = make_mesh(MeshConfig(data=2, context=4))

    def split(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return split_tokens(x)

    x = jax.device_put(np.zeros((4, 8, 8, 3), np.float32), batch_sharding(mesh))
    assert {shard.data.shape for shard in jax.jit(split)(x).addressable_shards} == {(2, 2, 8, 3)}


def test_rows_that_cannot_be_shared_out_are_refused():
    mesh = make_mesh(MeshConfig(data=2, context=4))
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        pytest.raises(UserError, match=r"mesh\.context 4 does not divide the 6 rows"),
    ):
        split_tokens(jnp.zeros((4, 6, 8, 3)))


def test_without_a_mesh_nothing_is_placed():
    x = jnp.zeros((4, 8, 8, 3))
    assert split_tokens(x) is x
    assert gather_weights({"q": x})["q"] is x


def test_a_block_gathers_its_weights_but_for_what_tensor_splits():
    mesh = make_mesh(MESH)
    spec = PartitionSpec("fsdp", "tensor")
    kernel = jax.device_put(np.zeros((64, 64), np.float32), NamedSharding(mesh, spec))

    def gather(params):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gather_weights(params)

    gathered = jax.jit(gather)({"q": {"kernel": kernel}, "modulation": {"kernel": kernel}})
    shapes = {
        name: leaf["kernel"].sharding.shard_shape((64, 64)) for name, leaf in gathered.items()
    }
    assert shapes == {"q": (64, 32), "modulation": (64, 64)}


def _is_adam(node) -> bool:
    return hasattr(node, "mu")
