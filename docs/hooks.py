"""Fill the page of recipes with what the recipes state of themselves."""

import ast
import re

from jaxdiff.cli.recipes import summarize_recipe
from jaxdiff.config.recipe_files import RECIPES, recipe_names

MARKER = "<!-- recipes -->"


def recipe_table() -> str:
    """Return the table of all recipes, then the description of each."""
    lines = ["| recipe | purpose | hardware | cost |", "|---|---|---|---|"]
    sections = []
    for name in recipe_names():
        path = RECIPES / f"{name}.py"
        purpose, hardware, cost = summarize_recipe(path)[1:]
        lines.append(f"| [`{name}`](#{name}) | {purpose} | {hardware} | {cost} |")
        sections.append(f"## {name}\n\n{_markdown(ast.get_docstring(ast.parse(path.read_text())))}")
    return "\n".join(lines) + "\n\n" + "\n\n".join(sections)


def _markdown(docstring: str | None) -> str:
    """Return a docstring as Markdown: indented blocks stay code, fields become a list."""
    text = re.sub(r"^(Hardware|Cost): ", r"- **\1:** ", docstring or "", flags=re.MULTILINE)
    return text.replace("\n- **Hardware", "\n\n- **Hardware", 1)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the marker; MkDocs calls this for each page."""
    return markdown.replace(MARKER, recipe_table()) if MARKER in markdown else markdown
