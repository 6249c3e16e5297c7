"""The devices that can be planned for, and the errors for others."""

import importlib.util

import jax
import pytest

from jaxdiff.errors import UserError
from jaxdiff.planning.topology import find_topology


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
        ("v5e:16", "expected 2 sides, such as v5e:4x4"),
        ("v5p:4x4", "expected 3 sides, such as v5p:4x4x4"),
        ("v5e:axb", "expected 2 sides"),
        ("cpu:4096", "more simulated devices than the 8 .*host_platform_device_count=4096"),
        ("gpu", "no GPU that JAX can use"),
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


def test_a_slice_of_an_unknown_shape_is_refused():
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match=r"There is no slice v5e:3x3 .*powers of two"):
        find_topology("v5e:3x3")
