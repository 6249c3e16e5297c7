"""The table of chips: figures and a source for each kind of device."""

from types import SimpleNamespace

import jax
import pytest

from jaxdiff.distributed.chips import CHIPS, chip_of, find_chip, peak_flops
from jaxdiff.errors import UserError


@pytest.mark.parametrize(
    ("kind", "flops", "memory_gib", "bandwidth", "interconnect"),
    [
        ("TPU v5 lite", 197e12, 16, 819e9, 200e9),
        ("TPU v5", 459e12, 95, 2765e9, 600e9),
        ("TPU v6 lite", 918e12, 32, 1638e9, 400e9),
        ("TPU7x", 1153.5e12, 96, 3690e9, 300e9),
        ("NVIDIA H100 80GB HBM3", 989e12, 80, 3350e9, 450e9),
        ("NVIDIA H100 PCIe", 756e12, 80, 2000e9, 64e9),
        ("NVIDIA A100-SXM4-40GB", 312e12, 40, 1555e9, 300e9),
        ("NVIDIA L40", 181e12, 48, 864e9, 32e9),
        ("NVIDIA H200 NVL", 835e12, 141, 4800e9, 450e9),
    ],
)
def test_device_kinds_map_to_their_figures(kind, flops, memory_gib, bandwidth, interconnect):
    chip = chip_of(SimpleNamespace(platform="other", device_kind=kind))
    assert (chip.flops, chip.memory) == (flops, memory_gib * 2**30)
    assert (chip.bandwidth, chip.interconnect) == (bandwidth, interconnect)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.kind)
def test_a_kind_is_of_the_longest_entry_of_whole_words(chip):
    assert find_chip(chip.kind) is chip
    assert find_chip(f"{chip.kind} 1g") is chip
    for more in ("0", "S", "x", "-80GB"):
        assert find_chip(chip.kind + more) is not chip


def test_every_figure_has_a_source():
    assert all(chip.source for chip in CHIPS)


def test_an_unknown_chip_is_an_error():
    with pytest.raises(UserError, match=r"'Tesla T4'.*expected one of TPU v2.*chips\.py"):
        chip_of(SimpleNamespace(platform="gpu", device_kind="Tesla T4"))


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v6e", 918e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_an_accelerator_is_that_of_its_data_sheet(kind, peak):
    assert peak_flops(SimpleNamespace(platform="other", device_kind=kind)) == peak


def test_the_peak_of_a_cpu_is_measured_once_and_divided_by_its_devices(monkeypatch):
    first, second = (peak_flops(device) for device in jax.devices("cpu")[:2])
    assert first == second > 0
    monkeypatch.setattr(jax, "local_device_count", lambda _: 1)
    assert peak_flops(jax.devices("cpu")[0]) == pytest.approx(first * len(jax.devices("cpu")))
