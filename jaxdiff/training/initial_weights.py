"""The weights that a run starts from: frozen parts, and trained parts that start from a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
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


def load_parts(parts: Mapping[Path, PretrainedPart], types: Sequence[type] = ()) -> dict[str, Any]:
    """Load parts from their folders, or initialise those without one, on the host.

    Args:
      parts: by their paths.
      types: dataclasses that the folders may name beside those of this package.

    Returns:
      A tree with each part at its path, in the types of its module.

    Raises:
      UserError: a folder holds no such part, or one of another size.
    """
    sources = {
        path: PartSource(part.folder, _path_in_model(path), abstract_params(part.build))
        for path, part in parts.items()
        if part.folder is not None
    }
    loaded: dict[Path, Any] = read_parts(sources, types)
    for path, part in parts.items():
        if part.folder is None:
            loaded[path] = jax.device_get(_initialised(part))
    return tree_of(loaded)


def load_frozen(config: Config, out: epath.Path) -> PyTree:
    """Load the frozen parts from the run's own copy, which is made the first time."""
    parts = config.task.frozen_parts()
    if not parts:
        return {}

    def copy() -> None:
        if not (out / FROZEN).exists():
            write_weights(out / FROZEN, load_parts(parts, types_in(config)))

    run_on_host0(copy)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), read_weights(out / FROZEN))


def abstract_frozen_params(task: Task) -> dict[str, Any]:
    """Return shapes and types of the frozen parts as stored, with nothing read."""
    parts = task.frozen_parts()
    return tree_of({path: abstract_params(part.build) for path, part in parts.items()})


def _path_in_model(path: Path) -> Path:
    """Return where a part is in the model that it comes from; a teacher's is the model's own."""
    return path[1:] if path[0] == "teacher" else path


def _initialised(part: PretrainedPart) -> Any:
    return nnx.to_pure_dict(nnx.split(part.build())[1])
