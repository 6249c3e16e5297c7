"""Which plans are kept apart."""

from types import SimpleNamespace

import jax

from jaxdiff.config.serialization import accept_types
from jaxdiff.distributed.chips import CHIPS
from jaxdiff.planning.plan_cache import plan_file
from jaxdiff.planning.topology import Topology


def test_a_plan_is_of_the_number_and_the_kind_of_devices(tiny_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXDIFF_CACHE", str(tmp_path))

    def file_of(kind: str, count: int):
        devices = (SimpleNamespace(device_kind=kind),) * count
        topology = Topology(name="local", devices=devices, chip=CHIPS[0])
        return plan_file(tiny_recipe(), topology, (), quick=False)

    found = [
        file_of("NVIDIA H100 PCIe", 1),
        file_of("NVIDIA H100 PCIe", 8),
        file_of("NVIDIA L4", 8),
    ]
    assert len(set(found)) == 3
    assert file_of("NVIDIA L4", 8) == found[2]


def test_a_plan_is_of_the_settings_of_jax_and_of_the_compiler(tiny_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXDIFF_CACHE", str(tmp_path))
    device = SimpleNamespace(device_kind="TPU v4")
    topology = Topology(name="v4:2x2x1", devices=(device,), chip=CHIPS[0])

    def file():
        return plan_file(tiny_recipe(), topology, (), quick=False)

    found = [file()]
    with jax.default_matmul_precision("bfloat16"):
        found.append(file())
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, "--xla_something=1")
        found.append(file())
    assert len(set(found)) == 4
    with accept_types([type(device)]):
        assert file() is None
