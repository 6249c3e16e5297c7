"""The rules that lay a train state out on a mesh.

A leaf's place follows from its name and its shape alone, so that the rules serve parameters, their
moving average and the optimizer's moments alike, which carry the same names.
"""

import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

# Layers whose outputs are split over `tensor`, and those that take such outputs in: between the two
# nothing is exchanged, after the second one sum is (Shoeybi et al. 2019, section 3).
_SPLIT_OUTPUT = re.compile(r"\.(q|k|v|gate|up|mlp_in)\.kernel$")
_SPLIT_INPUT = re.compile(r"\.(out|down|mlp_out)\.kernel$")
# Stacked blocks carry their depth as the first axis, which the scan runs over: never split it.
# Those of a list, `.blocks.0.`, do not.
_STACKED = re.compile(r"\.blocks\.(?!\d)")
# Below this size an all-gather costs more than the memory it saves.
_SMALLEST = 2**12


def _name(path) -> str:
    """`params.denoiser.blocks.attention.q.kernel`, however the tree spells its keys."""
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return "." + ".".join(parts)


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where one array goes: its place by name on `tensor`, its longest free axis on `fsdp`.

    Args:
      name: the path of the leaf, joined by dots.
      shape: of the array.
      mesh: with the axes of `jaxdiff.parallel.mesh`.
    """
    spec: list[str | None] = [None] * len(shape)
    first = 1 if _STACKED.search(name) else 0
    if len(shape) - first < 2:
        return PartitionSpec()
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    axis = (
        len(shape) - 1
        if _SPLIT_OUTPUT.search(name)
        else len(shape) - 2
        if _SPLIT_INPUT.search(name)
        else None
    )
    if axis is not None and tensor > 1 and shape[axis] % tensor == 0:
        spec[axis] = "tensor"
    free = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % fsdp == 0]
    size = 1
    for length in shape[first:]:
        size *= length
    if fsdp > 1 and free and size >= _SMALLEST:
        spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def state_shardings(abstract: PyTree, mesh: Mesh) -> PyTree:
    """A sharding for each leaf of an abstract train state (from `jax.eval_shape`)."""

    def place(path, leaf):
        return NamedSharding(mesh, partition_spec(_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, abstract)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
