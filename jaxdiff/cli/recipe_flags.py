"""Parse command lines that start with a recipe; each of its keys is a flag."""

import dataclasses
import itertools
from typing import Any

from jaxdiff.cli.parsing import parse_flags
from jaxdiff.config.recipe_files import DEFAULT_RECIPE
from jaxdiff.config.serialization import flatten, to_json
from jaxdiff.io.text import check_text
from jaxdiff.training.recipe import Config, load_recipe, on_topology


def parse_recipe_flags(target: Any, arguments: list[str], *, prog: str) -> Any:
    """Parse a recipe and flags into a dataclass with a field `config`; see `parse_flags`.

    `--topology NAME` chooses the recipe's own settings for it, which other flags override.
    """
    config, rest = read_recipe(arguments)
    if "topology" in {field.name for field in dataclasses.fields(target)}:
        named = _value("--topology", rest)
        config = config if named is None else on_topology(config, named)
    options = parse_flags(target, rest, prog=prog, default=target(config=config))
    for key, value in flatten(to_json(options.config)).items():
        if isinstance(value, str):  # which config.json holds, and libraries of C++ take
            check_text(value, key)
    return options


def _value(name: str, arguments: list[str]) -> str | None:
    """Return the last value of a flag; None if it is not given."""
    value = None
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        flag, equals, given = word.partition("=")
        if flag == name:
            value = given if equals else following
    return value


def read_recipe(arguments: list[str]) -> tuple[Config, list[str]]:
    """Load the recipe that comes first, or the default one; return it and the other arguments."""
    if arguments and not arguments[0].startswith("-"):
        return load_recipe(arguments[0]), arguments[1:]
    return load_recipe(DEFAULT_RECIPE), arguments
