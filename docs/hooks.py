"""Fill the page of recipes with what the recipes state of themselves."""

import ast
import re
import textwrap

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
    """Return a docstring as Markdown: indented blocks become fenced code, fields a list."""
    text = re.sub(r"^(Hardware|Cost): ", r"- **\1:** ", docstring or "", flags=re.MULTILINE)
    return re.sub(r"(?:^    .*\n)+", _fenced, text + "\n", flags=re.MULTILINE)


def _fenced(block: re.Match[str]) -> str:
    return f"```text\n{textwrap.dedent(block[0])}```\n"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the marker; MkDocs calls this for each page."""
    return markdown.replace(MARKER, recipe_table()) if MARKER in markdown else markdown
