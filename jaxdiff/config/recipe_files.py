"""Find recipe files: those that ship with jaxdiff and those of the user.

The recipes are in `jaxdiff/configs` of an installed wheel and in `configs`, beside the package, of
a checkout.
"""

import difflib
import os
from pathlib import Path

from jaxdiff.errors import UserError

_PACKAGE = Path(__file__).parent.parent
RECIPES = next(
    (path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()),
    _PACKAGE / "configs",
)
DEFAULT_RECIPE = "produce"


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.py") if not path.stem.startswith("_"))


def names_recipe(word: str) -> bool:
    """Whether a word is a recipe: a Python file, or a shipped recipe's name that no path has."""
    return word.endswith(".py") or (word in recipe_names() and not Path(word).exists())


def find_recipe(recipe: str | os.PathLike[str]) -> Path:
    """Return the file of a recipe: a path, or a shipped recipe's name such as `produce`.

    Raises:
      UserError: there is no such file or shipped recipe; the message names the nearest.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    if path.parent in (Path(), Path("configs")) and path.suffix in ("", ".py"):
        shipped = RECIPES / f"{path.stem}.py"
        if shipped.is_file():
            return shipped
    names = recipe_names()
    nearest = difflib.get_close_matches(path.stem, names, n=1)
    if not nearest:
        hint = f"expected a Python file or one of {', '.join(names)}."
    elif path.suffix:
        hint = f"did you mean configs/{nearest[0]}.py?"
    else:
        hint = f"did you mean {nearest[0]}?"
    raise UserError(f"There is no recipe {recipe}: {hint}")
