"""A mesh uses every device, or the error names the keys to change."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxdiff.distributed.mesh import AXES, MeshConfig, batch_sharding, check_batch, make_mesh
from jaxdiff.errors import UserError


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=-1), (1, 2, 4, 1, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (1, 2, 2, 2, 1)),
        (MeshConfig(data=1, tensor=8), (1, 1, 1, 8, 1)),
        (MeshConfig(data=-1, context=4), (1, 2, 1, 1, 4)),
        (MeshConfig(slices=2, data=-1, fsdp=2), (2, 2, 2, 1, 1)),
    ],
)
def test_axes_cover_all_devices(config, sizes):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(zip(AXES, sizes, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_can_use_a_subset_of_the_devices():
    chosen = jax.devices()[2:6]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), chosen)
    assert list(mesh.devices.flat) == chosen


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=16),
        MeshConfig(data=4),
        MeshConfig(data=-1, tensor=3),
        MeshConfig(data=-1, fsdp=16),
    ],
)
def test_a_mesh_of_the_wrong_size_is_an_error(config):
    with pytest.raises(UserError, match=r"does not fit the 8 devices: .* change mesh\.data"):
        make_mesh(config)


@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_tensor_and_context_devices_hold_the_same_images(axis):
    mesh = make_mesh(MeshConfig(data=4, **{axis: 2}))
    batch = jax.device_put(np.arange(8), batch_sharding(mesh))
    held = [tuple(np.asarray(shard.data)) for shard in batch.addressable_shards]
    assert sorted(held) == sorted([(0, 1), (2, 3), (4, 5), (6, 7)] * 2)


def test_slices_hold_different_images():
    mesh = make_mesh(MeshConfig(slices=2, data=2, tensor=2))
    check_batch(4, mesh, 1)
    batch = jax.device_put(np.arange(4), batch_sharding(mesh))
    assert [int(shard.data[0]) for shard in batch.addressable_shards] == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(UserError, match=r"4 data x 1 fsdp devices .*choose a multiple of 4"):
        check_batch(6, mesh, 1)


@pytest.mark.parametrize(("slices", "hardware"), [(1, 2), (2, 1)])
def test_the_slices_of_a_mesh_are_those_of_the_hardware(slices, hardware):
    devices = [SimpleNamespace(platform="tpu", slice_index=i % hardware) for i in range(8)]
    message = rf"mesh\.slices {slices} .* expected {hardware}; set mesh\.slices to {hardware}"
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(slices=slices), devices)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, r"-1 .* for at most one of them; change mesh\.data"),
        ({"data": 0}, r"-1 .* for at most one of them; change mesh\.data"),
        ({"tensor": -2}, "tensor is -2: expected a whole number, at least -1"),
    ],
)
def test_invalid_axis_sizes_are_an_error(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(**sizes))


def test_an_indivisible_batch_is_an_error_that_names_a_valid_multiple():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    check_batch(12, mesh, 3)  # tensor devices hold the same images
    with pytest.raises(UserError, match=r"train\.batch_size 12 .*choose a multiple of 8"):
        check_batch(12, mesh, 2)
    with pytest.raises(UserError, match="choose a multiple of 4"):
        check_batch(6, mesh, 1)
