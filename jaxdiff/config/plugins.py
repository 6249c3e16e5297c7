"""Import user modules whose types commands accept: `--plugin MODULE`.

Configuration files never import code.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence

from jaxdiff.errors import UserError


def import_plugins(modules: Sequence[str]) -> tuple[type, ...]:
    """Import modules, also from the current folder, and return the dataclasses that they define.

    Raises:
      UserError: a module cannot be imported.
    """
    found: list[type] = []
    for name in modules:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"--plugin {name} cannot be imported ({error}): expected the name of a Python "
                "module; check PYTHONPATH."
            ) from error
        found += [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and dataclasses.is_dataclass(value)
            and value.__module__ == module.__name__
        ]
    return tuple(found)
