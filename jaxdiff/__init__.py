"""Text-to-image diffusion in JAX: `jaxdiff.load()(["a small green pea"])` draws a pea.

`load` returns a trained pipeline. `jaxdiff.training.recipe` defines recipes, and `jaxdiff.training`
trains them.
"""

from jaxdiff.pipelines.pipeline import load

__all__ = ["load"]
