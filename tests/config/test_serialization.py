"""Frozen dataclasses as JSON and back, and what is refused."""

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from jaxdiff.config.serialization import flatten, to_json, types_in
from jaxdiff.diffusion.objectives import Denoising, LossInputs, LossOutputs, Objective
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import EvalContext, Evaluator, Report
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.training.recipe import Config, config_from_json


@pytest.fixture
def data(tiny_recipe):
    return to_json(tiny_recipe())


def _set(data, path, value):
    *parents, last = path.split(".")
    for name in parents:
        data = data[name]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.batchsize", 3, r"train\.batchsize is not a key.*train\.batch_size\?"),
        ("optimiser", {}, r"optimiser is not a key.*config\.optimizer\?"),
        ("data.source.type", "Product", r"data\.source is of type Product: expected ImageFolder"),
        ("data.source.type", [], r"data\.source is of type \[\]: expected ImageFolder"),
        ("data.source.type", {"a": 1}, r"data\.source is of type \{'a': 1\}"),
        ("task", None, r"config\.task is None: expected DiffusionTask or"),
        ("task.model", 3, r"task\.model is 3: expected TextToImage"),
        ("task.model.denoiser", 3, r"task\.model\.denoiser is 3: expected DiTConfig or"),
        ("train.steps", "many", r"train\.steps is 'many': expected int"),
        ("train.steps", True, r"train\.steps is True: expected int"),
        ("train.steps", 0, r"train\.steps is 0"),
        ("train.seed", -1, r"train\.seed is -1: expected a whole number from 0"),
        ("train.compute", "float8", "expected 'float32' or 'bfloat16'"),
        ("task.trainable.lora", {"type": "LoraConfig", "targets": [1]}, r"targets\[0\] is 1"),
        ("task.model.sampler.wrap", [True], r"sampler\.wrap is \[True\]"),
        ("evaluators", [3], r"evaluators\[0\] is 3: expected SampleGrid or"),
    ],
)
def test_unexpected_values_of_a_recipe_are_refused(data, path, value, message):
    _set(data, path, value)
    with pytest.raises(UserError, match=message):
        config_from_json(data)


def test_a_missing_key_that_has_no_default_is_refused(data):
    del data["task"]["model"]["denoiser"]
    with pytest.raises(UserError, match=r"config\.task\.model\.denoiser is missing"):
        config_from_json(data)


def test_missing_keys_take_their_defaults(tiny_recipe, data):
    del data["ema"], data["train"]["keep"]
    assert config_from_json(data) == tiny_recipe()


def test_whole_numbers_stand_for_floats(tiny_recipe, data):
    data["task"]["model"]["sampler"]["guidance_scale"] = 4
    scale = config_from_json(data).task.model.sampler.guidance_scale
    assert scale == 4
    assert isinstance(scale, float)


@pytest.mark.parametrize("data", [[], 3, "text", None, {}])
def test_json_of_something_else_is_refused(data):
    with pytest.raises(UserError, match="expected Config"):
        config_from_json(data)


def test_flatten_joins_names_with_points():
    assert flatten({"a": {"b": 1, "c": [2, 3]}, "d": None}) == {"a.b": 1, "a.c": [2, 3], "d": None}


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A part of an objective that this package does not know."""

    scale: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Mine(Objective):
    """An objective that this package does not know."""

    inner: Inner

    def loss(self, inputs: LossInputs) -> LossOutputs:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Watching(Evaluator):
    """An evaluator that this package does not know."""

    name: ClassVar[str] = "watching"
    every: int = 0

    def evaluate(self, context: EvalContext) -> Report:
        raise NotImplementedError


@pytest.fixture
def extended(tiny_recipe) -> Config:
    """The tiny recipe with an objective and an evaluator that this package does not know."""
    config = tiny_recipe()
    task = dataclasses.replace(config.task, objective=Mine(inner=Inner(scale=3.0)))
    return dataclasses.replace(config, task=task, evaluators=(Watching(every=2),))


def test_unknown_types_are_refused_unless_they_are_named(extended):
    data = json.loads(json.dumps(to_json(extended)))
    with pytest.raises(UserError, match=r"objective is of type Mine: expected Denoising.*types="):
        config_from_json(data)
    with pytest.raises(UserError, match=r"evaluators\[0\] is of type Watching"):
        config_from_json(data, types=(Mine, Inner))
    assert config_from_json(data, types=(Mine, Inner, Watching)) == extended


def test_a_named_type_is_accepted_only_where_its_base_is_expected(extended):
    data = to_json(extended)
    data["task"]["model"]["denoiser"] = data["task"]["objective"]
    with pytest.raises(UserError, match="denoiser is of type Mine"):
        config_from_json(data, types=(Mine, Inner, Watching))


def test_types_in_a_value_are_those_that_it_is_made_of(extended, tiny_recipe):
    types = types_in(extended)
    assert {Config, TextToImage, Mine, Inner, Watching} <= set(types)
    assert len(types) == len(set(types))
    assert not {AutoencoderConfig, Denoising} & set(types)
    assert config_from_json(to_json(extended), types=types) == extended
    assert config_from_json(to_json(tiny_recipe()), types=types) == tiny_recipe()
    assert types_in((1, "a", None)) == ()
