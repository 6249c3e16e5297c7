"""Load the frozen parts of a run, and the pretrained weights of trained parts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from flax import nnx
from jaxtyping import PyTree

from jaxdiff.config.serialization import types_in
from jaxdiff.distributed.multihost import run_on_host0
from jaxdiff.models.layers import abstract_params
from jaxdiff.models.text_to_image import tree_of
from jaxdiff.pretrained.bundle import read_weights, write_weights
from jaxdiff.pretrained.load import PartSource, read_parts
from jaxdiff.pretrained.run_folder import FROZEN
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.base import Path, PretrainedPart, Task


def load_parts(
    parts: Mapping[Path, PretrainedPart], types: Sequence[type] = (), *, widen: bool = True
) -> dict[str, Any]:
    """Load parts from their folders, or initialise those without one, on the host.

    Args:
      parts: by their paths.
      types: dataclasses that the folders may name beside those of this package.
      widen: return arrays in the types of the modules, not in those of the folders.

    Returns:
      A tree with each part at its path.

    Raises:
      UserError: a folder holds no such part, or one of another size.
    """
    sources = {
        path: PartSource(part.folder, part.source or path, abstract_params(part.build))
        for path, part in parts.items()
        if part.folder is not None
    }
    loaded: dict[Path, Any] = read_parts(sources, types, widen=widen)
    for path, part in parts.items():
        if part.folder is None:
            loaded[path] = jax.device_get(nnx.to_pure_dict(nnx.split(part.build())[1]))
    return loaded[()] if () in loaded else tree_of(loaded)


def load_frozen(config: Config, out: epath.Path) -> PyTree:
    """Load the frozen parts from the run's copy, which the first start writes.

    Both hold the types of their source, such as bfloat16.
    """
    parts = config.task.frozen_parts()
    if not parts:
        return {}

    def copy() -> None:
        if not (out / FROZEN).exists():
            stored = load_parts(parts, types_in(config), widen=False)
            write_weights(out / FROZEN, stored, dtype=None)

    run_on_host0(copy)
    return read_weights(out / FROZEN, widen=False)


def abstract_frozen_params(task: Task) -> dict[str, Any]:
    """Return shapes of the frozen parts, in the types of their modules, without reading them."""
    parts = task.frozen_parts()
    return tree_of({path: abstract_params(part.build) for path, part in parts.items()})
