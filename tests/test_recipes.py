import json
import re
from pathlib import Path

import jax
import pytest

from jaxdiff.config.serialization import to_json
from jaxdiff.distributed.mesh import check_batch, make_mesh
from jaxdiff.training.abstract import abstract_state
from jaxdiff.training.recipe import Config, config_from_json, differences, load_recipe
from jaxdiff.training.tasks.autoencoder import AutoencoderTask
from jaxdiff.training.tasks.clip import ClipTask

ROOT = Path(__file__).parent.parent
# Parameters in the files of Stable Diffusion's U-Nets, and of diffusers' adapters of rank 16.
PUBLISHED = {
    "sd15": 859_520_964,
    "sd15_dreambooth": 3_188_736,
    "sd15_inversion": 768,
    "sd15_lcm_lora": 67_252_224,
    "sd15_lora": 3_188_736,
    "sd21": 865_910_724,
    "sdxl": 2_567_463_684,
    "sdxl_lora": 23_224_320,
}
RECIPES = sorted((ROOT / "configs").glob("*.py"))


@pytest.fixture(scope="module", params=RECIPES, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def config(path) -> Config:
    return load_recipe(path)


def test_there_are_recipes_for_all_three_tasks():
    kinds = {type(load_recipe(path).task).__name__ for path in RECIPES}
    assert kinds == {"DiffusionTask", "AutoencoderTask", "ClipTask"}


def test_it_is_named_like_its_file(path, config):
    assert config.name == path.stem


def test_it_builds_abstractly(path, config):
    state = abstract_state(config)
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert 500 < trained < 2e10
    assert trained == PUBLISHED.get(path.stem, trained)
    assert jax.tree.structure(state.ema) == jax.tree.structure(state.params)


def test_its_batch_fits_one_device(config):
    check_batch(config.train.batch_size, make_mesh(config.mesh, jax.devices()[:1]), 1)


def test_its_tokens_fit_its_text_encoders(config):
    task = config.task
    if isinstance(task, AutoencoderTask):
        pytest.skip("reads no text")
    if isinstance(task, ClipTask):
        sizes = [(task.model.text.length, task.model.text.vocab_size)]
    else:
        encoders = task.model.conditioner.encoders.values()
        sizes = [(encoder.length, encoder.model.vocab_size) for encoder in encoders]
    for length, vocab_size in sizes:
        assert config.tokenizer.length <= length
        assert config.tokenizer.vocab_size <= vocab_size


def test_its_evaluators_can_evaluate_its_model(config):
    for evaluator in config.evaluators:
        evaluator.check(config.task.model, config.data)


def test_it_survives_json(config):
    again = config_from_json(json.loads(json.dumps(to_json(config))))
    assert again == config
    assert differences(again, config) == []


def test_its_docstring_states_command_and_hardware(path):
    module = path.read_text().split('"""')[1]
    assert f"python train.py configs/{path.name}" in module or (
        path.stem == "produce" and re.search(r"python train\.py$", module, re.MULTILINE)
    )
    assert re.search(r"\b(CPU|GPU|TPU)\b", module)
    assert re.search(r"\b(minutes|hours)\b|not\s+been\s+(trained|measured)", module)
