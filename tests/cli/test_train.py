"""`jaxdiff train --show`."""

import dataclasses

from jaxdiff.cli import main as cli
from jaxdiff.cli import train
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.training.recipe import load_recipe


def test_show_prints_the_resolved_recipe_and_its_state_and_trains_nothing(monkeypatch, capsys):
    def fail(*_, **__):
        raise AssertionError("it trained")

    monkeypatch.setattr(train, "run_recipe", fail)
    assert cli.main(["train", "produce", "--show", "--train.steps", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in ("train.steps = 7", "task = DiffusionTask", 'name = "produce"'):
        assert line in lines
    assert any(line.startswith("trained parameters: 2,") for line in lines)
    assert any(line.startswith("frozen parameters: 3,") for line in lines)


def test_state_is_sharded_as_the_mesh_says_without_the_devices():
    recipe = load_recipe("dit_xl2_imagenet256")
    sizes = []
    for fsdp in (1, 16):
        config = dataclasses.replace(recipe, mesh=MeshConfig(data=1, fsdp=fsdp))
        line = train.describe_recipe(config).splitlines()[-1]
        sizes.append(float(line.split()[3].replace(",", "")))
    assert sizes[1] < sizes[0] / 8


def test_a_topology_chooses_the_settings_that_the_recipe_has_for_it(capsys):
    recipe = ["train", "configs/dit_3b_512.py", "--show"]
    assert cli.main([*recipe, "--topology", "h100:8", "--train.steps", "7"]) == 0
    shown = capsys.readouterr().out
    planned = next(s for s in load_recipe(recipe[1]).slices if s.topology == "h100:8")
    assert f"mesh.fsdp = {planned.mesh.fsdp}\n" in shown
    assert f"train.accumulate = {planned.accumulate}\n" in shown
    assert "train.steps = 7\n" in shown
    assert cli.main([*recipe, "--topology", "v9:8"]) == 2
    assert "--topology v9:8: dit_3b_512 has no settings for it" in capsys.readouterr().err
