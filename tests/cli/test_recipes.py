"""`jaxdiff recipes`, and how a recipe is named."""

import shutil
from pathlib import Path

import pytest

from jaxdiff.cli import main as cli
from jaxdiff.cli.recipes import summarize_recipe
from jaxdiff.config.recipe_files import RECIPES, find_recipe, recipe_names
from jaxdiff.errors import UserError
from jaxdiff.training.recipe import load_recipe

DOCUMENTED = '''"""A recipe for
two lines.

    python train.py configs/x.py

Hardware: two CPU cores,
  or a GPU.
Cost: 7 minutes.

More about it. It costs nothing else.
"""
'''


def test_every_shipped_recipe_is_listed(capsys):
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert {path.stem for path in Path("configs").glob("*.py")} == set(recipe_names())
    for name in recipe_names():
        assert name in listed
        assert summarize_recipe(RECIPES / f"{name}.py").purpose


def test_purpose_hardware_and_cost_come_from_the_docstring(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(DOCUMENTED)
    assert summarize_recipe(path) == (
        "x",
        "A recipe for two lines",
        "two CPU cores, or a GPU",
        "7 minutes",
    )
    path.write_text('"""A purpose."""\n')
    assert summarize_recipe(path) == ("x", "A purpose", "", "")


def test_one_recipe_is_described(capsys):
    assert cli.main(["recipes", "sd15_lora"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{RECIPES / 'sd15_lora.py'}\n")
    assert "python train.py configs/sd15_lora.py" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sd15_lroa"], "There is no recipe sd15_lroa: did you mean sd15_lora?"),
        (["a", "b"], "takes at most one recipe, got a b"),
        (["--all"], "takes at most one recipe, got --all"),
    ],
)
def test_user_errors_are_one_line(refused, words, message):
    assert message in refused("recipes", *words)


@pytest.mark.parametrize("name", ["produce", "produce.py", "configs/produce.py"])
def test_a_shipped_recipe_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == RECIPES / "produce.py"


def test_a_file_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    mine = tmp_path / "configs" / "produce.py"
    mine.write_text("")
    assert find_recipe("configs/produce.py").resolve() == mine
    assert find_recipe("produce") == RECIPES / "produce.py"
    assert find_recipe(mine) == mine


def test_a_path_elsewhere_means_no_shipped_recipe(tmp_path):
    with pytest.raises(UserError, match=r"There is no recipe .*: did you mean configs/produce\.py"):
        find_recipe(tmp_path / "produce.py")


def test_recipes_load_others_of_their_folder(tmp_path):
    for path in RECIPES.glob("*.py"):
        shutil.copy(path, tmp_path)
    assert load_recipe(tmp_path / "produce_long.py") == load_recipe("produce_long")
