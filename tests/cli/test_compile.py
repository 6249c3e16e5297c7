"""`jaxdiff compile`, and `jaxdiff sample --compiled`."""

import dataclasses

import pytest

from jaxdiff.cli import compile as compile_cli
from jaxdiff.cli import main as cli
from jaxdiff.pipelines import exported
from jaxdiff.pipelines.compiled import CompiledFolder
from jaxdiff.planning.topology import find_topology
from jaxdiff.pretrained.bundle import write_bundle


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_bundle) -> str:
    """The folder of the tiny model."""
    folder = tmp_path_factory.mktemp("model")
    write_bundle(folder, tiny_bundle)
    return str(folder)


def test_the_command_writes_what_sample_reads(
    model, tmp_path, capsys, monkeypatch, jax_cache, recwarn
):
    out, folder = str(tmp_path / "out"), str(tmp_path / "compiled")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    words = ["compile", model, "--size", "32x40", "--topology", "cpu:8", "--out", folder]
    assert cli.main([*words, "--batch-size", "2"]) == 0
    said = "Wrote the program of tiny for 32x40, batches of 2 on 8 cpu, to "
    assert capsys.readouterr().out == f"{said}{folder}\n"

    def refuse(spec):
        raise AssertionError("traced")

    monkeypatch.setattr(exported, "compiled_sampler", refuse)
    command = ["sample", "a pea", "--model", model, "--size", "32x40", "--out", out]
    assert cli.main([*command, "--compiled", folder]) == 0
    assert "no program" not in capsys.readouterr().err
    assert [p.batch_size for p in CompiledFolder(folder).programs] == [2]


def test_mistakes_are_answered_in_one_sentence(model, tmp_path, refused, monkeypatch):
    assert "no compiled programs" in refused("sample", "a pea", "--compiled", str(tmp_path))
    (tmp_path / "file").touch()
    words = ["compile", model, "--out", str(tmp_path / "file")]
    with monkeypatch.context() as patch:
        patch.setattr(compile_cli, "compile_sampler", None)  # it is not called
        assert "file cannot be written to as a folder" in refused(*words)
    assert "batch-size" in refused("compile", model, "--batch-size", "0")
    assert "no topology 'v5'" in refused("compile", model, "--topology", "v5")
    assert "33x32" in refused("compile", model, "--size", "33x32")
    assert "--solver" in refused("compile", model, "--solver", "pea")


def test_programs_for_gpus_are_not_made_elsewhere(model, refused, monkeypatch):
    topology = dataclasses.replace(find_topology("cpu:1"), proxy_topology="v5p:2x2x2")
    monkeypatch.setattr(compile_cli, "find_topology", lambda _: topology)
    assert "only where there is one" in refused("compile", model, "--topology", "h100:8")


@pytest.mark.nightly
def test_a_tpu_slice_is_compiled_for_without_a_tpu(model, tmp_path, monkeypatch, jax_cache):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in ("v5e:2x4", "v6e:2x4"):
        words = ["compile", model, "--topology", name, "--out", str(tmp_path)]
        assert cli.main(words) == 0
    programs = CompiledFolder(tmp_path).programs
    found = {(p.device_kind, p.devices, p.batch_size) for p in programs}
    assert found == {("TPU v5 lite", 8, 64), ("TPU v6 lite", 8, 64)}
    assert len(list((tmp_path / "executables" / "any").iterdir())) == 2
