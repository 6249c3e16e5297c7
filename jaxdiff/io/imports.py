"""Imports that a command does without."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Hide PyTorch from libraries that are imported in the context, unless it is imported already.

    tensorboardX and transformers import it where it is installed, which takes seconds, and work
    without it.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # `import torch` raises ImportError
    try:
        yield
    finally:
        sys.modules.pop("torch", None)
