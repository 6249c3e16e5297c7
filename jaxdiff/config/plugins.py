"""Import user modules whose types commands accept: `--plugin MODULE`.

Configuration files never import code.
"""

import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from jaxdiff.errors import UserError

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_IMPORTLIB = os.path.dirname(importlib.__file__)


def import_plugins(modules: Sequence[str]) -> tuple[type, ...]:
    """Import modules, also from the current folder, and return the dataclasses that they define.

    Raises:
      UserError: a module cannot be imported, or fails.
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
        except (Exception, SystemExit) as error:
            raise failure_of(f"--plugin {name}", error) from error
        found += [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and dataclasses.is_dataclass(value)
            and value.__module__ == module.__name__
        ]
    return tuple(found)


def failure_of(name: str, error: BaseException) -> UserError:
    """Return the exception that the user's Python code `name` raised as a `UserError`."""
    places = [
        f"line {place.lineno} of {place.filename}: "
        for place in traceback.extract_tb(error.__traceback__)
        if not place.filename.startswith((_PACKAGE, _IMPORTLIB, "<frozen"))
    ]
    return UserError(
        f"{name} fails ({''.join(places[:1])}{type(error).__name__}: {error}): correct it."
    )
