"""`jaxdiff plan` on the command line."""

import dataclasses
import json

import pytest

from jaxdiff.cli import main as cli
from jaxdiff.cli import plan as command
from jaxdiff.cli.plan import parse_mesh
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.errors import UserError
from jaxdiff.planning.topology import find_topology
from jaxdiff.training.recipe import load_recipe


def test_a_mesh_is_parsed_from_its_axes():
    assert parse_mesh("data=16,fsdp=16") == MeshConfig(data=16, fsdp=16)
    assert parse_mesh("fsdp=-1, context=2") == MeshConfig(data=1, fsdp=-1, context=2)


@pytest.mark.parametrize("text", ["16x16", "pipeline=2", "data=", "data=two", "data=--5", "data=²"])
def test_an_invalid_mesh_is_refused(text):
    with pytest.raises(
        UserError, match=r"is not an axis and its size: expected some of slices, data"
    ):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "no topology 'v9:2x2'"),
        ([], "names no slices: give --topology"),
        (["--topology", "cpu:8", "--mesh", "data=3"], "does not fit the 8 devices"),
        (["--topology", "cpu:8", "--mesh", "rows=8"], "is not an axis"),
        (["--topology", "cpu:8", "--mesh", "data=8", "--train.batch-size", "12"], "multiple of 8"),
        (["--topologie", "cpu:8"], "did you mean --topology"),
    ],
)
def test_user_errors_are_one_sentence(arguments, message, capsys):
    assert cli.main(["plan", "configs/produce.py", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_json_alone_is_printed(some_plan, monkeypatch, capsys):
    monkeypatch.setattr(command, "make_plan", lambda *_, **__: some_plan)
    assert cli.main(["plan", "configs/produce.py", "--topology", "cpu:8", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["recipe"], printed["memory_needed"], printed["fits"]) == ("tiny", 2.0, True)


def test_settings_for_a_topology_come_before_flags(some_plan, monkeypatch):
    """The recipe's own for v5e:16x16, except for what is given."""
    planned = []
    one = find_topology("cpu:1")
    monkeypatch.setattr(command, "find_topology", lambda name: dataclasses.replace(one, name=name))
    monkeypatch.setattr(
        command, "make_plan", lambda config, on, **_: planned.append((config, on.name)) or some_plan
    )
    arguments = ["plan", "configs/dit_xl2_imagenet256.py", "--train.accumulate", "4"]
    assert cli.main(arguments) == 0
    recipe = load_recipe("configs/dit_xl2_imagenet256.py")
    assert [name for _, name in planned] == [s.topology for s in recipe.slices]
    assert [config.mesh for config, _ in planned] == [s.mesh for s in recipe.slices]
    assert {config.train.accumulate for config, _ in planned} == {4}
    policies = [config.task.model.denoiser.remat for config, _ in planned]
    assert policies == [s.remat or recipe.task.model.denoiser.remat for s in recipe.slices]
    planned.clear()
    assert cli.main([*arguments, "--topology=v5e:16x16", "--mesh", "data=256"]) == 0
    ((config, name),) = planned
    assert (name, config.mesh.data, config.mesh.fsdp) == ("v5e:16x16", 256, 1)
    planned.clear()
    assert cli.main([*arguments, "--topology", "2xv5e:16x16"]) == 0
    ((config, name),) = planned
    own = next(s for s in recipe.slices if s.topology == "v5e:16x16")
    assert (name, config.mesh) == ("2xv5e:16x16", dataclasses.replace(own.mesh, slices=2))
