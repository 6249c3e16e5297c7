"""Transformers in one file, in the layout of their original code.

A module there may hold several modules of diffusers, such as queries, keys and values, in rows one
under another. A table has the modules of the original code, each with diffusers' modules in it.

ComfyUI puts `model.diffusion_model.` before all names. A file may also hold diffusers' names, or
other components, which are left unread.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.pretrained.config_check import MOST_LAYERS
from jaxdiff.pretrained.safetensors_io import Cut, Renamed, Shape, TensorFiles

Rows = tuple[slice, ...]

Pieces = tuple[tuple[str, Rows | None], ...]
"""Modules of diffusers that an original module holds, and their rows in it; None for all."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "")

_OTHERS = re.compile(r"(vae|text_encoders?|first_stage_model|conditioner)\b")


def stacked_rows(names: Collection[str], size: int) -> Pieces:
    """Return modules of `size` rows one under another; the last has all that follow."""
    ends = [*range(size, size * len(names), size), None]
    return tuple(
        (name, (slice(i * size, end),))
        for i, (name, end) in enumerate(zip(names, ends, strict=True))
    )


def cut(rows: Rows) -> Cut:
    """Return the function that takes rows of a tensor."""
    if len(rows) == 1:
        return lambda x: x[rows[0]]
    return lambda x: np.concatenate([x[part] for part in rows])


def put(whole: np.ndarray, rows: Rows, value: np.ndarray) -> None:
    """Write rows to their places in a tensor, the inverse of `cut`."""
    start = 0
    for part in rows:
        place = whole[part]
        place[...] = value[start : start + len(place)]
        start += len(place)


def to_diffusers_names(
    modules: Mapping[str, Pieces],
) -> Callable[[str], str | Mapping[str, Cut | None]]:
    """Return what `Renamed` takes to read tensors of the original code under diffusers' names.

    A name that the table does not have stays as it is. A norm's scale is called weight.
    """

    def rename(name: str) -> str | Mapping[str, Cut | None]:
        module, _, leaf = name.rpartition(".")
        leaf = "weight" if leaf == "scale" else leaf
        if module not in modules:
            return name
        pieces = modules[module]
        return {f"{new}.{leaf}": None if rows is None else cut(rows) for new, rows in pieces}

    return rename


def to_original_names(
    tensors: Mapping[str, np.ndarray], modules: Mapping[str, Pieces]
) -> dict[str, np.ndarray]:
    """Return tensors of diffusers under the original names: the inverse of `to_diffusers_names`."""
    left, found = dict(tensors), dict[str, np.ndarray]()
    for old, pieces in modules.items():
        for leaf in ("weight", "bias"):
            if f"{pieces[0][0]}.{leaf}" in left:
                values = [(rows, left.pop(f"{new}.{leaf}")) for new, rows in pieces]
                found[f"{old}.{leaf}"] = _joined(values)
    return found | left


def _joined(values: Sequence[tuple[Rows | None, np.ndarray]]) -> np.ndarray:
    """Return the tensor of an original module from those of all pieces, with their rows."""
    rows, first = values[0]
    if rows is None:
        return first
    size = sum(len(value) for _, value in values)
    dtype = np.result_type(*(value.dtype for _, value in values))
    whole = np.empty((size, *first.shape[1:]), dtype)
    for rows, value in values:
        assert rows is not None  # which is of a piece without others
        put(whole, rows, value)
    return whole


class TransformerShapes(NamedTuple):
    """Shapes of a transformer's tensors, from which its config follows.

    Attributes:
      file: for messages.
      what: the family, for messages.
      shapes: by name, without prefix, in either spelling.
    """

    file: object
    what: str
    shapes: Mapping[str, Shape]

    def shape(self, rank: int, *names: str) -> Shape:
        """Return the shape of the first of these tensors that is there, with so many axes.

        Tensors without elements do not count.

        Raises:
          UserError: there is none.
        """
        for name in names:
            shape = self.shapes.get(name, ())
            if len(shape) == rank and all(shape):
                return shape
        raise UserError(
            f"{self.file} lacks {names[0]}: expected the tensors of a {self.what} transformer; "
            "copy it again."
        )

    def depth(self, stack: str) -> int:
        """Return the number of layers of a stack; 1 without any, so that they are missed.

        Raises:
          UserError: there are more than `MOST_LAYERS`.
        """
        found = (re.match(rf"{stack}\.([0-9]+)\.", name) for name in self.shapes)
        # Longer numbers are cut off, which leaves them too large.
        depth = 1 + max((int(layer[1][:9]) for layer in found if layer), default=0)
        if depth > MOST_LAYERS:
            raise UserError(
                f"{self.file} numbers {stack} beyond {MOST_LAYERS - 1}: expected at most "
                f"{MOST_LAYERS} of them; copy it again, or use another model."
            )
        return depth


def prefix_of(names: Collection[str], marks: Collection[str]) -> str | None:
    """Return what precedes one of the marks, which are names of tensors; None without any."""
    for prefix in PREFIXES:
        if any(prefix + mark in names for mark in marks):
            return prefix
    return None


def open_transformer(file: epath.PathLike, what: str, marks: Collection[str]) -> Renamed:
    """Open the tensors of a transformer in a file, without their prefix.

    Args:
      file: safetensors.
      what: the family, for messages.
      marks: names of tensors; the network has one of them.

    Raises:
      UserError: the file is damaged, or holds no such network.
    """
    tensors = TensorFiles([epath.Path(file)])
    prefix = prefix_of(tensors.shapes, marks)
    if prefix is None:
        raise UserError(
            f"{file} holds no {what} transformer: expected {' or '.join(marks)}, also after "
            f"{PREFIXES[0]}; use another file."
        )

    def bare(name: str) -> str | None:
        is_other = not name.startswith(prefix) or (not prefix and _OTHERS.match(name))
        return None if is_other else name.removeprefix(prefix)

    return Renamed(tensors, bare)
