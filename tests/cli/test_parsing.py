"""Hints for the flags of other projects."""

import re

import pytest

from jaxdiff.cli.generate.options import SampleFlags
from jaxdiff.cli.parsing import _flags
from jaxdiff.cli.peer_flags import PEER_FLAGS
from jaxdiff.cli.train import TrainOptions
from jaxdiff.training.recipe import load_recipe


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """The flags that exist: for `train`, those of any of a few recipes."""
    recipes = ("produce", "sd15", "sd15_lora")
    train = {flag for r in recipes for flag in _flags(TrainOptions(config=load_recipe(r)))}
    return {"jaxdiff sample": set(_flags(SampleFlags)), "jaxdiff train": train}


@pytest.mark.parametrize("prog", PEER_FLAGS)
def test_the_answer_exists_and_the_question_does_not(prog, known):
    for theirs, ours in PEER_FLAGS[prog].items():
        assert theirs not in known[prog], theirs
        for flag in re.findall(r"--[\w.-]+", ours):
            assert flag in known[prog], (theirs, flag)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample", "a pea", "--num-inference-steps", "3"), "--num-steps"),
        (("sample", "a pea", "--num_inference_steps=3"), "--num-steps"),
        (("sample", "a pea", "--cfg-scale", "3"), "--guidance-scale"),
        (("sample", "a pea", "--steps", "3"), "--num-steps"),
        (("sample", "a pea", "--height", "64"), "--size WIDTHxHEIGHT"),
        (("sample", "a pea", "--W", "64"), "--size WIDTHxHEIGHT"),
        (("sample", "a pea", "--guidance", "3"), "--guidance-scale"),
        (("sample", "a pea", "--n_iter", "3"), "--num-images"),
        (("sample", "a pea", "--ddim_steps", "3"), "--num-steps"),
        (("sample", "a pea", "--batch-count", "3"), "--num-images"),
        (("sample", "--prompt", "a pea"), "the prompt itself, without a flag"),
        (("train", "--max_train_steps", "3"), "--train.steps"),
        (("train", "--learning-rate", "1"), "--optimizer.learning-rate"),
        (("train", "--output_dir", "x"), "--out"),
        (("train", "--dcn_data_parallelism", "2"), "--mesh.slices"),
    ],
)
def test_a_flag_of_another_project_is_answered_with_ours(refused, words, message):
    assert refused(*words).endswith(f": it is {message} here.\n")
