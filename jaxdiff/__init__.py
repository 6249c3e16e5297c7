"""Text-to-image diffusion in JAX: `jaxdiff.load()(["a small green pea"])` draws a pea.

`load` gives a trained pipeline; `jaxdiff.config` says what a recipe is, and `jaxdiff.training`
trains it.
"""

from jaxdiff.pipeline import load

__all__ = ["load"]
