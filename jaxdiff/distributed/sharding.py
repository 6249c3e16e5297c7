"""The rules that lay a train state out on a mesh.

A leaf's place follows from its name and its shape alone, so that the rules serve parameters, their
moving average and the optimizer's moments alike, which carry the same names.
"""

import re

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxdiff.distributed.mesh import BATCH
from jaxdiff.errors import UserError

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


def tensor_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """What `tensor` splits of an array: its place follows from the array's name."""
    spec: list[str | None] = [None] * len(shape)
    axis = (
        len(shape) - 1
        if _SPLIT_OUTPUT.search(name)
        else len(shape) - 2
        if _SPLIT_INPUT.search(name)
        else None
    )
    if axis is not None and mesh.shape["tensor"] > 1 and shape[axis] % mesh.shape["tensor"] == 0:
        spec[axis] = "tensor"
    return PartitionSpec(*spec)


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Where one array goes: its place by name on `tensor`, its longest free axis on `fsdp`.

    Args:
      name: the path of the leaf, joined by dots.
      shape: of the array.
      mesh: with the axes of `jaxdiff.distributed.mesh`.
    """
    first = 1 if _STACKED.search(name) else 0
    if len(shape) - first < 2:
        return PartitionSpec()
    fsdp = mesh.shape["fsdp"]
    spec = list(tensor_spec(name, shape, mesh))
    free = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % fsdp == 0]
    size = 1
    for length in shape[first:]:
        size *= length
    if fsdp > 1 and free and size >= _SMALLEST:
        spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def state_shardings(abstract: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """A sharding for each leaf of an abstract train state (from `jax.eval_shape`)."""

    def place(path, leaf):
        return NamedSharding(mesh, partition_spec(_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, abstract)


def traced_mesh() -> AbstractMesh | None:
    """The mesh that XLA lays out the traced program on.

    None where it has none, or a single device, or where each device runs a program of its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def gather_weights(params: PyTree) -> PyTree:
    """A block's weights as its products take them: whole, but for what `tensor` splits.

    So each device gathers the weights of one block at a time, and its gradients of them are summed
    and dealt out again (Zhao et al. 2023). Left to itself, XLA may gather the activations of all
    images instead. Under the mesh of the program that is traced; without one, as they are.
    """
    mesh = traced_mesh()
    if mesh is None or mesh.shape["fsdp"] == 1:
        return params

    def gather(path, leaf):
        return jax.lax.with_sharding_constraint(leaf, tensor_spec(_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(gather, params)


def split_tokens(x: Array) -> Array:
    """Images or latents [b, h, w, c] as activations lie: images in turn, and rows over `context`.

    What is computed of them lies likewise, the tokens of a transformer included. Under the mesh of
    the program that is traced; without one, x.

    Raises:
      UserError: the rows do not divide.
    """
    mesh = traced_mesh()
    if mesh is None or mesh.shape["context"] == 1:
        return x
    if x.shape[1] % mesh.shape["context"]:
        raise UserError(
            f"mesh.context {mesh.shape['context']} does not divide the {x.shape[1]} rows of what "
            "is modelled: choose a divisor of them."
        )
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*BATCH, "context"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
