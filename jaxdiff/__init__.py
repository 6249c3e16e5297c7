"""Text-to-image diffusion in JAX: `jaxdiff.load()("a small green pea")` generates an image.

The public names are imported on first use, so that `import jaxdiff` and the command line start
without JAX. `jaxdiff.training.recipe` defines recipes, and `jaxdiff.training` trains them.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdiff.errors import UserError
    from jaxdiff.pipelines.pipeline import Pipeline, load
    from jaxdiff.sampling.guidance.cfg import Guidance

__all__ = ["Guidance", "Pipeline", "UserError", "__version__", "load"]

_MODULES = {
    "Guidance": "jaxdiff.sampling.guidance.cfg",
    "Pipeline": "jaxdiff.pipelines.pipeline",
    "UserError": "jaxdiff.errors",
    "load": "jaxdiff.pipelines.pipeline",
}

try:
    __version__ = importlib.metadata.version("jaxdiff")
except importlib.metadata.PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
