import ast
import dataclasses
import json
import re
import types
import typing
from pathlib import Path
from typing import Literal

import pytest

import jaxdiff
from jaxdiff.config.serialization import from_json, members, to_json
from jaxdiff.data.loader import DataConfig
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import ClipTextEncoder
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.training.recipe import (
    DATASETS,
    Config,
    PlannedTopology,
    differences,
    load_recipe,
    on_topology,
)
from jaxdiff.training.tasks.autoencoder import Perceptual

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.py"))


def parts(hint) -> list[type]:
    """The dataclasses that a field may hold, also within a tuple."""
    found = []
    for member in members(hint):
        if dataclasses.is_dataclass(member):
            found.append(member)
        inner = [a for a in typing.get_args(member) if isinstance(a, type | types.UnionType)]
        found += [part for a in inner for part in parts(a)]
    return found


def reachable(cls: type, seen: dict[type, None] | None = None) -> list[type]:
    """All dataclasses that a recipe may be made of."""
    seen = {} if seen is None else seen
    if cls not in seen:
        seen[cls] = None
        for hint in typing.get_type_hints(cls).values():
            for part in parts(hint):
                reachable(part, seen)
    return list(seen)


DATACLASSES = reachable(Config)


def example(cls: type):
    """An instance; what has no default gets a value of its type."""
    values = {}
    for f in dataclasses.fields(cls):
        if f.default is f.default_factory is dataclasses.MISSING:
            hint = typing.get_type_hints(cls)[f.name]
            kind = members(hint)[0]
            if dataclasses.is_dataclass(kind):
                values[f.name] = example(kind)
            elif typing.get_origin(kind) is Literal:
                values[f.name] = typing.get_args(kind)[0]
            else:
                values[f.name] = {str: "text", int: 2, float: 2.0, tuple: ()}[
                    typing.get_origin(kind) or kind
                ]
    if cls.__name__ == "ClipConfig":
        values = {
            name: dataclasses.replace(value, projection_dim=8) for name, value in values.items()
        }
    if cls is TextToImage:
        text = values["conditioner"].text
        model = dataclasses.replace(text.model, width=values["denoiser"].text_width, heads=4)
        text = dataclasses.replace(text, model=model)
        values["conditioner"] = dataclasses.replace(values["conditioner"], text=text)
    if cls.__name__ == "Qwen3TextEncoder":
        values["hidden_layers"] = (2,)
    if cls.__name__ == "NoiseCurriculum":
        values["steps_per_level"] = 2
    return cls(**values)


def through_file(value, annotation):
    return from_json(annotation, json.loads(json.dumps(to_json(value))), types=DATASETS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_survives_json(path):
    config = load_recipe(path)
    again = through_file(config, Config)
    assert again == config
    assert to_json(again) == to_json(config)
    assert hash(again) == hash(config)


@pytest.mark.parametrize("cls", DATACLASSES, ids=lambda cls: cls.__name__)
def test_every_dataclass_of_a_recipe_survives_json(cls):
    value = example(cls)
    again = through_file(value, cls)
    assert again == value
    assert to_json(again) == to_json(value)


def test_a_recipe_contains_every_type_that_it_may_have():
    """So the tests over DATACLASSES are not empty."""
    names = {cls.__name__ for cls in DATACLASSES}
    assert {"ImageFolder", "TFDS", "Shifted", "Heun", "MinSNR", "NoiseCurriculum"} <= names
    assert {TextToImage, ClipTextEncoder, Perceptual, DataConfig} <= set(DATACLASSES)
    assert {"SampleGrid", "ProduceAccuracy", "StableDiffusionXLConditioner"} <= names


@pytest.mark.parametrize("cls", DATACLASSES, ids=lambda cls: cls.__name__)
def test_members_of_a_union_have_different_names(cls):
    for name, hint in typing.get_type_hints(cls).items():
        names = [part.__name__ for part in parts(hint)]
        assert len(names) == len(set(names)), name


def _reads(tree: ast.AST) -> set[str]:
    """Names of attributes that are read, `x.name`, and of those in getattr(x, "name")."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return names


def _without_checks(tree: ast.Module) -> ast.Module:
    """The module without `__post_init__`: to check a key is not to use it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.body = [n for n in node.body if getattr(n, "name", "") != "__post_init__"]
    return tree


def test_every_key_is_read_by_something():
    """Somewhere where the dataclass, a base of it, or one that holds it, is known by name."""
    modules = {}
    for path in Path(jaxdiff.__file__).parent.rglob("*.py"):
        source = path.read_text()
        modules[frozenset(re.findall(r"\w+", source))] = _reads(_without_checks(ast.parse(source)))
    unread = []
    for cls in DATACLASSES:
        holders = {other.__name__ for other in DATACLASSES if cls in reachable(other)}
        holders |= {"Bundle"}  # which holds a Config
        holders |= {base.__name__ for base in cls.__mro__[:-1]}
        reads = set().union(*(reads for words, reads in modules.items() if holders & words))
        unread += [
            f"{cls.__name__}.{f.name}" for f in dataclasses.fields(cls) if f.name not in reads
        ]
    assert not unread


def test_a_key_that_is_only_checked_counts_as_unread():
    """So the test above can fail."""
    source = "class A:\n  def __post_init__(self):\n    self.checked\n  def f(self): self.used"
    assert _reads(_without_checks(ast.parse(source))) == {"used"}


def test_differences_name_the_keys(tiny_recipe):
    ours = tiny_recipe(steps=6)
    assert differences(ours, tiny_recipe(steps=6)) == []
    assert differences(ours, tiny_recipe(steps=7)) == ["train.steps is 6 here and 7 there"]


def test_differences_of_another_type_show_its_keys(tiny_recipe):
    ours = tiny_recipe()
    without = dataclasses.replace(ours.task, curriculum=None)
    lines = differences(ours, dataclasses.replace(ours, task=without))
    assert any(line.startswith("task.curriculum.levels is 10 here") for line in lines)
    assert any(line.startswith("task.curriculum is '(none)' here and None") for line in lines)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module", "line 1 of .*ModuleNotFoundError"),
        ("def get_config():\n    raise KeyError('x')", "line 2 of .*KeyError"),
        ("def get_config(): return get_config()", "RecursionError"),
        ("import sys\nsys.exit(3)", "line 2 of .*SystemExit: 3"),
        ("from jaxdiff.training.recipe import Config\ndef get_config(): return Config()", "line 2"),
        ("def get_config(size): pass", "TypeError"),
        ("get_config = 3", "defines no get_config"),
        ("def get_config(): return {}", "returned {}: expected a Config"),
        ("def get_config(): pass", "returned None: expected a Config"),
    ],
)
def test_a_recipe_that_fails_is_a_user_error(tmp_path, code, reason):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match=reason):
        load_recipe(tmp_path / "mine.py")


def test_settings_of_a_topology_are_those_of_each_of_several_slices(tiny_recipe):
    mesh = MeshConfig(data=2, fsdp=8)
    named = PlannedTopology(
        topology="v5e:4x4", mesh=mesh, accumulate=2, batch_size=512, remat="dots"
    )
    config = dataclasses.replace(tiny_recipe(), slices=(named,))
    one, two = on_topology(config, "v5e:4x4"), on_topology(config, "2xv5e:4x4")
    assert (one.mesh, one.train.accumulate, one.train.batch_size) == (mesh, 2, 512)
    assert one.task.model.denoiser.remat == "dots"
    assert two == dataclasses.replace(one, mesh=dataclasses.replace(mesh, slices=2))
    assert on_topology(config, "v5e:8x8") == config
    assert on_topology(config, "3xv5e:8x8").mesh == dataclasses.replace(config.mesh, slices=3)
