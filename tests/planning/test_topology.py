"""The devices that can be planned for, and the errors for others."""

import dataclasses
import importlib.util
import io

import jax
import pytest
from rich.console import Console

from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.planning.plan import make_plan
from jaxdiff.planning.table import plan_table
from jaxdiff.planning.topology import find_topology, parse_slices


def test_simulated_devices_are_those_of_this_machine():
    topology = find_topology("cpu:4")
    assert list(topology.devices) == jax.devices("cpu")[:4]
    assert topology.chip.kind == "cpu"
    assert topology.chip.flops > topology.chip.bandwidth > 1e8


def test_local_devices_can_be_planned_for():
    assert list(find_topology("local").devices) == jax.devices()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "no topology 'v9:2x2'.*v4, v5e, v5p, v6e, tpu7x.*cpu:N"),
        ("t4:8", "no topology 't4:8'.*a100, h100"),
        ("cpu:0", "no topology 'cpu:0'"),
        ("h100:3", "power of two"),
        ("2xh100:8", "no topology '2xh100:8'"),
        ("v5e:16", "expected 2 sides, such as v5e:4x4"),
        ("v5p:4x4", "expected 3 sides, such as v5p:4x4x4"),
        ("v5e:axb", "expected 2 sides"),
        ("cpu:4096", "more simulated devices than the 8 .*host_platform_device_count=4096"),
        ("gpu", "no GPU that JAX can use"),
        ("cpu:²", "no topology"),
        ("h100:²", "no topology"),
        pytest.param("cpu:" + "9" * 5000, "no topology", id="many digits"),
        pytest.param("9" * 5000 + "xv5e:4x4", "no topology", id="many slices"),
    ],
)
def test_others_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        find_topology(name)


def test_without_libtpu_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"libtpu, .*: run pip install -e '\.\[tpu\]'"):
        find_topology("v5e:4x4")


@pytest.mark.parametrize(
    ("name", "count", "chip", "stands_in"),
    [
        ("v5e:16x16", 256, "TPU v5 lite", None),
        ("v6e:16x16", 256, "TPU v6", None),
        ("2xv5e:16x16", 512, "TPU v5 lite", None),
        ("v5p:4x4x4", 64, "TPU v5", None),  # what is sold as v5p-128
        ("h100:8", 8, "NVIDIA H100", "v5p:2x2x2"),
    ],
)
def test_slices_need_no_chips(name, count, chip, stands_in):
    pytest.importorskip("libtpu")
    topology = find_topology(name)
    assert len(topology.devices) == count
    assert topology.chip is not None
    assert topology.chip.kind == chip
    assert topology.proxy_topology == stands_in


def test_several_slices_are_named_by_their_number():
    assert parse_slices("2xv5e:16x16") == (2, "v5e:16x16")
    for name in ("v5p:4x4x4", "cpu:8", "0xv5e:16x16"):
        assert parse_slices(name) == (1, name)


def test_slices_exchange_gradients_over_the_network(tiny_recipe):
    pytest.importorskip("libtpu")
    mesh = MeshConfig(slices=2, data=2, fsdp=2)
    config = dataclasses.replace(tiny_recipe(batch_size=16), mesh=mesh)
    plan = make_plan(config, find_topology("2xv5e:2x2"))
    # Each device of `data` sends a part, in float32 or less.
    assert 0 < plan.network < 8 * plan.parameters
    assert 0 < plan.network_s < plan.step_s
    console = Console(width=300, file=io.StringIO())
    console.print(plan_table(plan))
    assert ", between slices " in console.file.getvalue()


def test_simulated_slices_share_the_devices_of_this_process():
    assert len(find_topology("2xcpu:4").devices) == 8


def test_a_slice_of_an_unknown_shape_is_refused():
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match=r"There is no slice v5e:3x3 .*powers of two"):
        find_topology("v5e:3x3")


@pytest.mark.parametrize(
    ("name", "slices", "wraps"),
    [("v5e:4x4", 1, (False, False)), ("v5p:4x4x4", 1, (True,) * 3), ("2xv5e:4x4", 2, (False,) * 2)],
)
def test_devices_of_a_mesh_lie_on_the_torus(name, slices, wraps):
    pytest.importorskip("libtpu")
    topology = find_topology(name)
    links = topology.links(make_mesh(MeshConfig(data=4, fsdp=-1, slices=slices), topology.devices))
    assert (links.wraps, set(links.slices)) == (wraps, set(range(slices)))
    assert len(set(zip(links.slices, links.coordinates, strict=True))) == len(topology.devices)
    assert links.dimensions(range(4)) != (-1,)


def test_other_devices_reach_each_other_at_once():
    topology = find_topology("cpu:8")
    links = topology.links(make_mesh(MeshConfig(data=8), topology.devices))
    assert (links.dimensions((0, 1)), links.bandwidth) == ((), topology.chip.interconnect)
