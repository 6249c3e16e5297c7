"""Text-to-image diffusion in JAX: `jaxdiff.load()("a cat")` generates an image.

The public names are imported on first use, so that `import jaxdiff` and the command line start
without JAX. `jaxdiff.training.recipe` defines recipes, and `jaxdiff.training` trains them.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdiff.distributed.mesh import MeshConfig
    from jaxdiff.errors import UserError
    from jaxdiff.pipelines.input_images import InitImage, References
    from jaxdiff.pipelines.inputs import Mix
    from jaxdiff.pipelines.load import load
    from jaxdiff.pipelines.pipeline import Pipeline
    from jaxdiff.sampling.feature_cache import FirstBlockCache, TaylorSeer
    from jaxdiff.sampling.guidance.apg import APG
    from jaxdiff.sampling.guidance.autoguidance import Autoguidance
    from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar
    from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
    from jaxdiff.sampling.guidance.guidance import Guidance
    from jaxdiff.sampling.sampler import Sampler
    from jaxdiff.sampling.solvers_ode import DDIM, PLMS, DPMSolverPP2M, Euler, Heun
    from jaxdiff.sampling.solvers_sde import (
        DDPM,
        LCM,
        DPMSolverPP2MSDE,
        DPMSolverPPSDE,
        EulerAncestral,
    )
    from jaxdiff.sampling.unipc import UniPC

__all__ = [
    "APG",
    "DDIM",
    "DDPM",
    "LCM",
    "PLMS",
    "Autoguidance",
    "CFGZeroStar",
    "ClipGuidance",
    "DPMSolverPP2M",
    "DPMSolverPP2MSDE",
    "DPMSolverPPSDE",
    "Euler",
    "EulerAncestral",
    "FirstBlockCache",
    "Guidance",
    "Heun",
    "InitImage",
    "MeshConfig",
    "Mix",
    "Pipeline",
    "References",
    "Sampler",
    "TaylorSeer",
    "UniPC",
    "UserError",
    "__version__",
    "load",
]

_NAMES = {
    "jaxdiff.distributed.mesh": ("MeshConfig",),
    "jaxdiff.errors": ("UserError",),
    "jaxdiff.pipelines.input_images": ("InitImage", "References"),
    "jaxdiff.pipelines.inputs": ("Mix",),
    "jaxdiff.pipelines.load": ("load",),
    "jaxdiff.pipelines.pipeline": ("Pipeline",),
    "jaxdiff.sampling.feature_cache": ("FirstBlockCache", "TaylorSeer"),
    "jaxdiff.sampling.guidance.apg": ("APG",),
    "jaxdiff.sampling.guidance.autoguidance": ("Autoguidance",),
    "jaxdiff.sampling.guidance.cfg_zero": ("CFGZeroStar",),
    "jaxdiff.sampling.guidance.clip_guidance": ("ClipGuidance",),
    "jaxdiff.sampling.guidance.guidance": ("Guidance",),
    "jaxdiff.sampling.sampler": ("Sampler",),
    "jaxdiff.sampling.solvers_ode": ("DDIM", "PLMS", "DPMSolverPP2M", "Euler", "Heun"),
    "jaxdiff.sampling.solvers_sde": (
        "DDPM",
        "LCM",
        "DPMSolverPP2MSDE",
        "DPMSolverPPSDE",
        "EulerAncestral",
    ),
    "jaxdiff.sampling.unipc": ("UniPC",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

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
