"""Shard a train state over a mesh, from the logical axis names of its parameters.

Each parameter names its axes, such as ("layers", "embed", "heads"), and `AXIS_RULES` maps these
names to mesh axes. The EMA and the optimizer's moments are sharded like their parameters. Unnamed
axes may be split by `fsdp`: a network without names is sharded by the sizes of its arrays.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jaxdiff.distributed.mesh import BATCH, REPLICAS, num_replicas
from jaxdiff.errors import UserError

Axes = tuple[str | None, ...]
"""A name, or None, for each axis of a parameter."""

ParamAxes = Mapping[str, Any]
"""The `Axes` of parameters, a nested dict of the structure of the parameters."""

OfRows = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
"""A function (constants, rows) of a part of a batch."""

AXIS_RULES: Mapping[str | None, tuple[str, ...]] = {
    # `tensor` splits the outputs of the layer before heads or hidden units and the inputs of the
    # layer after them: one all-reduce per pair (Shoeybi et al. 2019, section 3).
    "heads": ("tensor", "fsdp"),
    "mlp": ("tensor", "fsdp"),
    "embed": ("fsdp",),
    "channels": ("fsdp",),
    "modulation": ("fsdp",),  # split, longest of its kernel, also while the block runs
    "vocab": ("fsdp",),
    "position": ("fsdp",),
    None: ("fsdp",),
    "layers": (),  # of stacked blocks, which a scan runs over
    "window": (),  # of a convolution
    "rank": (),  # of an adapter
}
"""Axes of the mesh that may split an axis of this name."""

# Below this size an all-gather costs more than the memory it saves.
_SMALLEST = 2**12

Reduction = Literal["compute", "float32"]
"""Type in which replicas of the model sum gradients."""

_Path = tuple[str, ...]


def tensor_spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Return the spec that splits the first divisible axis that `tensor` may split.

    Raises:
      UserError: `AXIS_RULES` lacks the name of an axis.
    """
    spec: list[str | None] = [None] * len(shape)
    size = mesh.shape["tensor"]
    if size > 1 and len(shape) > 1:
        split = [i for i in _may_split("tensor", axes) if shape[i] % size == 0]
        if split:
            spec[split[0]] = "tensor"
    return PartitionSpec(*spec)


def partition_spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Return the spec of an array: `tensor` by name, `fsdp` on its longest free axis.

    Vectors, stacked or not, are replicated; small arrays are not split over `fsdp`.

    Raises:
      UserError: `AXIS_RULES` lacks the name of an axis.
    """
    sides = [length for name, length in zip(axes, shape, strict=True) if name != "layers"]
    if len(sides) < 2:
        return PartitionSpec()
    fsdp = mesh.shape["fsdp"]
    spec = list(tensor_spec(axes, shape, mesh))
    free = [i for i in _may_split("fsdp", axes) if spec[i] is None and shape[i] % fsdp == 0]
    if fsdp > 1 and free and math.prod(sides) >= _SMALLEST:
        spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def _may_split(mesh_axis: str, axes: Axes) -> list[int]:
    """Return the indices of the axes that a mesh axis may split."""
    for name in axes:
        if name not in AXIS_RULES:
            known = ", ".join(repr(known) for known in AXIS_RULES)
            raise UserError(
                f"A parameter's axis is named {name!r}: expected one of {known}; rename it, or add "
                "its rule to AXIS_RULES in jaxdiff/distributed/sharding.py."
            )
    return [i for i, name in enumerate(axes) if mesh_axis in AXIS_RULES[name]]


def state_shardings(abstract: PyTree, mesh: Mesh | AbstractMesh, axes: ParamAxes) -> PyTree:
    """Return a sharding for each leaf of an abstract train state or a tree of parameters.

    A leaf has the axes of the parameter whose path ends its own, if both have the same rank:
    `opt_state.1.mu.denoiser.patch.kernel` has those of `denoiser.patch.kernel`, as have the values
    and the scale of a quantised kernel. All axes of other leaves are unnamed.
    """
    return jax.tree_util.tree_map_with_path(leaf_sharding(mesh, axes), abstract)


def leaf_sharding(
    mesh: Mesh | AbstractMesh, axes: ParamAxes
) -> Callable[[tuple[Any, ...], Any], NamedSharding]:
    """Return the map of `state_shardings` from the path of one leaf and the leaf."""
    named = _flat(axes)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec = partition_spec(_find(named, path, len(leaf.shape)), leaf.shape, mesh)
        return NamedSharding(mesh, spec)

    return place


def bytes_per_device(
    abstract: PyTree, mesh: Mesh | AbstractMesh, axes: ParamAxes, item_size: int | None = None
) -> int:
    """Return the bytes of a sharded tree on each device.

    `item_size` is that of its numbers in bytes; None is that of their types.
    """

    def size(leaf: Any, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * (item_size or leaf.dtype.itemsize)

    sizes = jax.tree.map(size, abstract, state_shardings(abstract, mesh, axes))
    return sum(jax.tree.leaves(sizes))


def _flat(axes: ParamAxes) -> dict[_Path, Axes]:
    flat: Any = traverse_util.flatten_dict(dict(axes))
    return {tuple(map(str, path)): names for path, names in flat.items()}


def _find(named: Mapping[_Path, Axes], path: tuple[Any, ...], rank: int) -> Axes:
    """Return the axes of the parameter whose path ends the path of a leaf."""
    keys = tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
    if keys[-2:-1] == ("kernel",):  # a `QuantizedKernel`, whose scale has axes of length 1
        keys = keys[:-1]
    for start in range(len(keys)):
        axes = named.get(keys[start:])
        if axes is not None and len(axes) == rank:
            return axes
    return (None,) * rank


def check_mesh(
    params: PyTree, axes: ParamAxes, mesh: Mesh | AbstractMesh, *, splits_tokens: bool
) -> None:
    """Raise `UserError` for a mesh axis that splits nothing of a model.

    `params` are all parameters, trained and frozen, or their shapes; `splits_tokens` states whether
    the model calls `split_tokens`.
    """
    shardings = jax.tree.leaves(state_shardings(params, mesh, axes))
    used = {axis for sharding in shardings for axis in sharding.spec}
    expected = {
        "fsdp": f"a divisor of an axis of a matrix of at least {_SMALLEST} elements",
        "tensor": "a divisor of the width of an attention or of a transformer's MLP",
    }
    for axis, divisor in expected.items():
        if mesh.shape[axis] > 1 and axis not in used:
            raise UserError(
                f"mesh.{axis} {mesh.shape[axis]} shards no parameter of this model: expected "
                f"{divisor}; choose another number, or set mesh.{axis} to 1 and raise mesh.data."
            )
    if mesh.shape["context"] > 1 and not splits_tokens:
        raise UserError(
            f"mesh.context {mesh.shape['context']} splits no activation of this task: expected 1, "
            "since only a denoiser's images are split; set mesh.context to 1 and raise mesh.data."
        )


def traced_mesh() -> AbstractMesh | None:
    """Return the mesh of the traced program; None for one device or inside `shard_map` of all."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(mesh.manual_axes) == set(mesh.axis_names)
    return None if mesh.empty or mesh.size == 1 or manual else mesh


def batch_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """Return the axes that split the batches of the traced program.

    Inside `mean_over_replicas` the batch is that of a replica, inside `mean_over_slices` that of a
    slice.
    """
    return tuple(a for a in BATCH[0] if a in mesh.axis_names and a not in mesh.manual_axes)


def gather_weights(params: PyTree, axes: ParamAxes) -> PyTree:
    """Gather a block's weights over `fsdp`; axes that `tensor` splits stay split.

    Kernels of a `Modulation` stay split over `fsdp` too.

    Each device gathers one block at a time (Zhao et al. 2023). Without the constraint XLA may
    gather activations instead. Cotangents are constrained to the sharding of the parameters, so
    that XLA reduce-scatters them over `fsdp` and all-reduces only these parts over `data`. Where
    `fsdp` alone splits the batch, they are constrained to be whole before: otherwise XLA moves
    partial sums from device to device between parts of each product, which cost more than they
    hide. Without a mesh, return the weights. `axes` exclude the axis of the stack.
    """
    mesh = traced_mesh()
    if mesh is None or mesh.shape["fsdp"] == 1:
        return params
    named = _flat(axes)
    alone = all(mesh.shape[axis] == 1 for axis in batch_axes(mesh) if axis != "fsdp")

    def gather(path, leaf):
        names = _find(named, path, leaf.ndim)
        split = partition_spec(names, leaf.shape, mesh)
        whole = split if "modulation" in names else tensor_spec(names, leaf.shape, mesh)
        return _gathered(whole, whole if alone else split, split, leaf)

    return jax.tree_util.tree_map_with_path(gather, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(
    whole: PartitionSpec, summed: PartitionSpec, split: PartitionSpec, weight: Array
) -> Array:
    """Constrain a weight to `whole`, and its cotangent to `summed`, then to `split`."""
    return jax.lax.with_sharding_constraint(weight, whole)


def _cotangent(
    whole: PartitionSpec, summed: PartitionSpec, split: PartitionSpec, _: None, cotangent: Array
) -> tuple[Array]:
    total = jax.lax.with_sharding_constraint(cotangent, summed)
    return (jax.lax.with_sharding_constraint(total, split),)


_gathered.defvjp(lambda *specs_and_weight: (_gathered(*specs_and_weight), None), _cotangent)


def shard_gradients(gradients: PyTree, axes: ParamAxes) -> PyTree:
    """Constrain gradients to the sharding of their parameters; without a mesh, return them."""
    mesh = traced_mesh()
    if mesh is None:
        return gradients
    specs = jax.tree.map(lambda s: s.spec, state_shardings(gradients, mesh, axes))
    return jax.lax.with_sharding_constraint(gradients, specs)


def whole_on_each_cpu() -> bool:
    """Whether the traced program runs on several CPU devices that each hold the whole model."""
    mesh = traced_mesh()
    device = None if mesh is None else mesh.abstract_device
    if mesh is None or device is None or device.device_kind != "cpu":
        return False
    return num_replicas(mesh) == mesh.size


def mean_over_replicas(function: OfRows) -> OfRows:
    """Return `function(constants, rows)` whose first result is averaged over parts of the rows.

    Each replica of the model computes it of its rows; the other axes of the mesh split these as
    before. What XLA would reduce within the function is thus reduced once, after it. The second
    result must not depend on the rows. Without replicas, return the function.
    """
    mesh = traced_mesh()
    if mesh is None or num_replicas(mesh) == 1:
        return function

    def of_replica(constants: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
        value, rest = function(constants, rows)
        return jax.lax.pmean(value, REPLICAS), rest

    axes = mesh.axis_names if whole_on_each_cpu() else REPLICAS
    return _of_rows(of_replica, mesh, REPLICAS, set(axes))


def mean_over_slices(function: OfRows, axes: ParamAxes, dtype: DTypeLike) -> OfRows:
    """Return `function(constants, rows)` whose first result is averaged over slices.

    That is a pair of gradients, with the axes of their parameters, which slices exchange in a type,
    and of other means. Each slice computes both of its rows, as in `mean_over_replicas`.
    """
    mesh = traced_mesh()
    if mesh is None:
        return function

    def of_slice(constants: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
        (gradients, metrics), rest = function(constants, rows)
        if mesh.shape["slices"] > 1:
            gradients = _mean_gradients(gradients, mesh, axes, dtype)
            metrics = jax.lax.pmean(metrics, "slices")
        return (gradients, metrics), rest

    # Also with one slice: XLA then plans DiT-XL/2 with 0.6 of the traffic of the memory.
    return _of_rows(of_slice, mesh, "slices", {"slices"})


def _of_rows(
    function: OfRows, mesh: AbstractMesh, rows: str | tuple[str, ...], manual: set[str]
) -> OfRows:
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(rows)),
        out_specs=PartitionSpec(),
        axis_names=manual,
        check_vma=False,
    )


def _mean_gradients(
    gradients: PyTree, mesh: AbstractMesh, axes: ParamAxes, dtype: DTypeLike
) -> PyTree:
    """Average gradients over slices, each device of `data` a part that the others gather from it.

    The network between slices is slower than the links within one. Parts are whole rows in tiles of
    eight, as a chip stores them: other parts would have another layout than the optimizer's state,
    and copy that.
    """
    data = mesh.shape["data"]

    def mean(leaf: Array) -> Array:
        sent = leaf.astype(dtype)
        if leaf.ndim < 2 or data == 1:
            return jax.lax.pmean(sent, "slices").astype(leaf.dtype)
        rows = sent.reshape(-1, leaf.shape[-1])
        count = 8 * math.ceil(len(rows) / (8 * data))
        padded = jnp.pad(rows, ((0, count * data - len(rows)), (0, 0)))
        own = jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index("data") * count, count)
        whole = jax.lax.all_gather(jax.lax.pmean(own, "slices"), "data", tiled=True)
        return whole[: len(rows)].reshape(leaf.shape).astype(leaf.dtype)

    specs = jax.tree.map(lambda s: s.spec, state_shardings(gradients, mesh, axes))
    return jax.shard_map(
        lambda tree: jax.tree.map(mean, tree),
        in_specs=(specs,),
        out_specs=specs,
        axis_names=set(mesh.axis_names) - {"slices"},
        check_vma=False,
    )(gradients)


def gather_kernel(kernel: Array) -> Array:
    """Gather a convolution's kernel if `context` splits images.

    XLA's partitioner computes wrong convolutions and gradients where both the rows of images and
    the channels of kernels are split (jax 0.10.2; jax-ml/jax#16894 reports a similar case).
    """
    mesh = traced_mesh()
    if mesh is None or mesh.shape["context"] == 1:
        return kernel
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec())


def split_tokens(x: Array) -> Array:
    """Split images or latents [b, h, w, c] over the mesh: images, and rows over `context`.

    Activations follow: a transformer's tokens, and the rows of a U-Net's feature maps, whose
    convolutions exchange border rows and call `gather_kernel`. Without a mesh, return x.

    Raises:
      UserError: `mesh.context` does not divide the rows.
    """
    mesh = traced_mesh()
    if mesh is None or mesh.shape["context"] == 1:
        return x
    return _split_rows(x, mesh, batch_axes(mesh))


def _split_rows(x: Array, mesh: AbstractMesh, images: tuple[str, ...]) -> Array:
    if x.shape[1] % mesh.shape["context"]:
        raise UserError(
            f"mesh.context {mesh.shape['context']} does not divide the {x.shape[1]} rows of images "
            "or latents: expected a divisor; choose one."
        )
    return jax.lax.with_sharding_constraint(x, PartitionSpec(images, "context"))


def split_images(x: Array) -> Array:
    """Split images or latents [b, h, w, c] as `split_tokens`; any number of images.

    Images are split over the mesh only where their number is divisible.
    """
    mesh = traced_mesh()
    if mesh is None:
        return x
    axes = batch_axes(mesh)
    if len(x) % math.prod(mesh.shape[axis] for axis in axes):
        axes = ()
    return _split_rows(x, mesh, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that are whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
