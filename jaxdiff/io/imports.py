"""Use libraries without PyTorch, which takes seconds, and which they import where it is."""

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

_hidden: dict[str, ModuleType] = {}


@contextlib.contextmanager
def without_torch(*libraries: str) -> Iterator[None]:
    """Hide PyTorch from what is imported in the context, unless it is imported already.

    Args:
      libraries: packages that remember whether there is PyTorch: those who import them outside of
        the context get another copy.
    """
    if any(name in sys.modules for name in ("torch", *libraries)) or find_spec("torch") is None:
        yield
        return
    sys.modules.update(_hidden)
    sys.modules["torch"] = None  # type: ignore[assignment]  # `import torch` raises ImportError
    try:
        yield
    finally:
        del sys.modules["torch"]
        for name in [name for name in sys.modules if name.partition(".")[0] in libraries]:
            _hidden[name] = sys.modules.pop(name)
