"""`jaxdiff recipes`: list the recipes, or print the docstring of one.

Recipes are parsed, not run, so that JAX is not imported.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from jaxdiff.config.recipe_files import RECIPES, find_recipe, recipe_names
from jaxdiff.errors import UserError
from jaxdiff.io.terminal import console, write_line, write_text
from jaxdiff.io.text import read_text


class RecipeSummary(NamedTuple):
    """Fields of a recipe's docstring; "" for missing ones."""

    name: str
    purpose: str
    hardware: str
    cost: str


def recipes_command(arguments: list[str]) -> None:
    """Run `jaxdiff recipes [RECIPE]`.

    Raises:
      UserError: there is no such recipe, or there are more words.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        write_line("usage: jaxdiff recipes [RECIPE]")
        write_line("")
        write_line("List the recipes that ship with jaxdiff, or print the description of one.")
    elif not arguments:
        console().print(_table([summarize_recipe(RECIPES / f"{n}.py") for n in recipe_names()]))
    elif len(arguments) == 1 and not arguments[0].startswith("-"):
        path = find_recipe(arguments[0])
        write_text(f"{path}\n\n{_docstring(path)}")
    else:
        raise UserError(
            f"jaxdiff recipes takes at most one recipe, got {' '.join(arguments)}: see "
            "jaxdiff recipes --help."
        )


def summarize_recipe(path: Path) -> RecipeSummary:
    """Read a recipe's purpose, hardware and cost from its docstring.

    The purpose is the first line. Hardware and cost are paragraphs or lines that start with
    `Hardware:` and `Cost:`.
    """
    text = _docstring(path)
    purpose = text.partition("\n\n")[0].replace("\n", " ").rstrip(".")
    return RecipeSummary(path.stem, purpose, _field("Hardware", text), _field("Cost", text))


def _field(name: str, text: str) -> str:
    """Return the text after `NAME:`, up to the next field or blank line."""
    found = re.search(rf"^{name}:(.*?)(?=^[A-Z]\w+:|^\s*$|\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()).rstrip(".") if found else ""


def _docstring(path: Path) -> str:
    try:
        return ast.get_docstring(ast.parse(read_text(path))) or ""
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is not a recipe: expected a Python file ({error}).") from error


def _table(summaries: list[RecipeSummary]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for field in ("name", "purpose", "hardware", "cost"):
        table.add_column(field, no_wrap=field == "name", overflow="fold")
    for summary in summaries:
        table.add_row(*summary)
    return table
