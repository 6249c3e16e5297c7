"""Where the parameters of a model go as they are read, one at a time."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

Place = Callable[[np.ndarray], Any]
"""Called with each parameter in our layout, such as to move it to a device; or a `Placement`."""


class Placement:
    """A `Place` that depends on the parameter's path in the model, such as to shard it."""

    def __init__(self, put: Callable[[tuple[Any, ...], Any], Any], path: tuple = ()):
        """Place by `put(path, value)`, below `path`."""
        self._put, self._path = put, path

    def __call__(self, value: np.ndarray | jax.Array) -> Any:
        """Place the parameter at this path."""
        return self._put(self._path, value)

    def below(self, path: tuple[Any, ...]) -> "Placement":
        """Return the placement of what lies at `path` below this one."""
        return Placement(self._put, (*self._path, *path))


def part_place(place: Place, *path: Any) -> Place:
    """Return how to place one part, or parameter; without a `Placement`, all alike."""
    return place.below(path) if isinstance(place, Placement) else place


def place_tree(place: Place, params: PyTree) -> PyTree:
    """Place all parameters of a nested dict."""
    return jax.tree_util.tree_map_with_path(
        lambda path, value: part_place(place, *(key.key for key in path))(value), params
    )
