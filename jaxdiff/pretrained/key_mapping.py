"""Map a network's parameters to the tensors of a PyTorch checkpoint, and back, by a table.

A table maps the path of one of our modules (or parameters) to its name there:

    "blocks.attention.q": "text_model.encoder.layers.{layer}.self_attn.q_proj"
    "encoder.levels.*.blocks.*": "encoder.down_blocks.{}.resnets.{}"

`*` is an index in a list, and fills the `{}` in order; `{layer}` marks layers that our parameters
stack along a leading axis. The entry with the longest matching path applies; the remaining path is
the same in both. `kernel` is transposed (linear) or permuted from HWIO to OIHW (convolution) and
called `weight` there, as is `scale`. Integers, such as counters, are int64 there and int32 here.
"""

import functools
import math
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxdiff.errors import UserError
from jaxdiff.pretrained.placement import Place, part_place
from jaxdiff.pretrained.safetensors_io import dtypes, shapes

Path = tuple[str | int, ...]

_LEAVES = {"kernel": "weight", "scale": "weight"}

_SHOWN = 5  # names in an error message
_READERS = 4  # layers read at a time
_LINE = 64  # bytes of a cache line; JAX's CPU backend does not copy arrays aligned to it


class Tensor(NamedTuple):
    """One parameter of ours and its name there; `depth` is None unless layers are stacked."""

    name: str
    is_kernel: bool
    depth: int | None

    def names(self) -> list[str]:
        """Return the name of each layer of the stack, or the only name."""
        return [self.name.format(layer=layer) for layer in range(self.depth or 1)]

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        """Return one layer in PyTorch's layout: [out, in] or [out, in, height, width]."""
        if not self.is_kernel:
            return value
        return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T

    def from_torch(self, value: np.ndarray, out: np.ndarray) -> bool:
        """Write the inverse of `to_torch` to an array of our layout; return whether it is finite.

        An array that is not finite is written in part.
        """
        if not self.is_kernel:
            out[...] = value
            return _is_finite(value)
        # Copy the rows of one cache line at a time, three times as fast as numpy's order. Their
        # check reads from the cache what the copy reads next.
        size = _LINE // value.itemsize
        for start in range(0, len(value), size):
            rows = slice(start, start + size)
            part = value[rows]
            if not _is_finite(part):
                return False
            out[..., rows] = part.transpose(2, 3, 1, 0) if value.ndim == 4 else part.T
        return True


def flatten_params(params: Mapping[str, Any]) -> dict[Path, Any]:
    """Return parameters by their paths."""
    return cast(dict[Path, Any], traverse_util.flatten_dict(params))


def locate(path: Path, shape: tuple[int, ...], names: Mapping[str, str]) -> Tensor:
    """Return the tensor of the parameter at `path` in a checkpoint, by the table `names`."""
    pieces = ["*" if isinstance(piece, int) else piece for piece in path]
    indices = [piece for piece in path if isinstance(piece, int)]
    for end in range(len(path), 0, -1):
        theirs = names.get(".".join(pieces[:end]))
        if theirs is None:
            continue
        rest = [str(piece) for piece in path[end:]]
        if rest:
            rest[-1] = _LEAVES.get(rest[-1], rest[-1])
        name = ".".join([theirs.format(*indices, layer="{layer}"), *rest])
        return Tensor(name, path[-1] == "kernel", shape[0] if "{layer}" in theirs else None)
    raise KeyError(f"the table of names has no entry for {'.'.join(map(str, path))}")


def listed(names: Collection[str]) -> str:
    """Return the first few names, and the number of the others, for an error message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more


def _raise_if_any(what: str, names: Collection[str], advice: str):
    if names:
        raise UserError(f"{what}: {listed(names)}; {advice}.")


def from_torch_names(
    tensors: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    params: Mapping[str, Any],
    *,
    place: Place = np.asarray,
    what: str = "checkpoint",
    advice: str = "check that the config belongs to this checkpoint",
) -> dict[str, Any]:
    """Read our parameters from a checkpoint's tensors, each in its own dtype.

    A stack of layers has the narrowest dtype that holds the numbers of all of them. All names and
    shapes are checked before the first tensor is read.

    Args:
      tensors: of the checkpoint, by name.
      names: the table.
      params: nested dict of the network's parameters, which may be abstract: only shapes are read.
      place: called with each parameter in our layout, below the network's path.
      what: what messages call the tensors.
      advice: what messages advise.

    Returns:
      What `place` returns, as a nested dict of the structure of `params`.

    Raises:
      UserError: tensors are missing, unexpected or of another shape; it names them.
    """
    flat = flatten_params(params)
    located = {path: locate(path, value.shape, names) for path, value in flat.items()}
    _check_tensors(shapes(tensors), flat, located, what, advice)
    arrays = _HostArrays({path: value.shape for path, value in flat.items()})
    types = dtypes(tensors)
    widest = {
        path: functools.reduce(jnp.promote_types, {types[name] for name in tensor.names()})
        for path, tensor in located.items()
    }
    left = {path: tensor.depth or 1 for path, tensor in located.items()}
    placed: dict[Path, Any] = {}

    def read(path: Path, layer: int) -> None:
        tensor, name = located[path], located[path].names()[layer]
        value = np.asarray(tensors[name])
        if np.issubdtype(value.dtype, np.integer) and flat[path].dtype == np.int32:
            placed[path] = part_place(place, *path)(_narrow(value, f"{what}: {name}"))
            return
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(
                f"{what}: {name} holds {value.dtype}: expected floating-point numbers; use a "
                "variant that is not quantised."
            )
        ours = arrays.take(path, widest[path])
        if not tensor.from_torch(value, ours if tensor.depth is None else ours[layer, ...]):
            raise UserError(
                f"{what}: {name} holds NaN or infinite numbers: expected finite weights; use "
                "another copy of the model."
            )
        with arrays.turn:
            left[path] -= 1
            if left[path]:
                return
        placed[path] = part_place(place, *path)(ours)
        arrays.release(path)

    # The largest first, while few others are placed already.
    order = sorted(located, key=arrays.sizes.__getitem__, reverse=True)
    jobs = [(path, layer) for path in order for layer in range(left[path])]
    with ThreadPoolExecutor(_READERS) as pool:  # numpy releases the GIL
        try:
            for _ in pool.map(lambda job: read(*job), jobs):
                pass
        except BaseException:
            arrays.close()  # others may wait for one that will not be placed
            raise
    return traverse_util.unflatten_dict({path: placed[path] for path in located})


class _HostArrays:
    """Arrays of the parameters that are being read.

    There are at most as many at a time as the largest and 1/20 of all together take. Parameters
    must be taken in an order in which each can be finished without a later one.
    """

    def __init__(self, shapes: Mapping[Path, tuple[int, ...]]):
        self.turn = threading.Condition()
        self.sizes = {path: math.prod(shape) for path, shape in shapes.items()}
        self._shapes = shapes
        self._most = max(self.sizes.values(), default=0) + sum(self.sizes.values()) // 20
        self._arrays: dict[Path, np.ndarray] = {}
        self._closed = False

    def take(self, path: Path, dtype: np.dtype) -> np.ndarray:
        """Return the array of a parameter; a new one waits until others are released."""
        with self.turn:
            self.turn.wait_for(lambda: path in self._arrays or self._closed or self._fits(path))
            if path not in self._arrays:
                self._arrays[path] = _aligned(self._shapes[path], dtype)
            return self._arrays[path]

    def release(self, path: Path) -> None:
        with self.turn:
            del self._arrays[path]
            self.turn.notify_all()

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self.turn:
            self._closed = True
            self.turn.notify_all()

    def _fits(self, path: Path) -> bool:
        return self.sizes[path] + sum(self.sizes[held] for held in self._arrays) <= self._most


def _check_tensors(
    theirs: Mapping[str, tuple[int, ...]],
    ours: Mapping[Path, Any],
    located: Mapping[Path, Tensor],
    what: str,
    advice: str,
) -> None:
    """Check names and shapes of a checkpoint's tensors against our parameters."""
    wanted = {name for tensor in located.values() for name in tensor.names()}
    _raise_if_any(f"{what}: missing tensors", wanted - set(theirs), advice)
    _raise_if_any(f"{what}: unexpected tensors", set(theirs) - wanted, advice)
    misshapen = []
    for path, tensor in located.items():
        shape = ours[path].shape if tensor.depth is None else ours[path].shape[1:]
        expected = tensor.to_torch(np.broadcast_to(np.zeros(()), shape)).shape
        misshapen += [
            f"{name} is {theirs[name]}, expected {expected}"
            for name in tensor.names()
            if theirs[name] != expected
        ]
    _raise_if_any(f"{what}: tensors of another shape", misshapen, advice)


def _narrow(value: np.ndarray, name: str) -> np.ndarray:
    """Return integers in int32, JAX's default."""
    narrow = value.astype(np.int32)
    if not np.array_equal(narrow, value):
        raise UserError(
            f"{name} is {value}: expected at most {np.iinfo(np.int32).max}; use another copy of "
            "the model."
        )
    return narrow


def _is_finite(value: np.ndarray) -> bool:
    # Of the numbers of one sign, NaN and infinity have the largest bits. As integers they are
    # compared several times as fast as `isfinite` works.
    signed, unsigned, plus, minus = _infinities(value.dtype)
    positive = value.view(signed).max(initial=0) < plus
    return bool(positive and value.view(unsigned).max(initial=0) < minus)


@functools.cache
def _infinities(dtype: np.dtype) -> tuple[np.dtype, np.dtype, int, int]:
    """Return the integer types of a type's size, and the bits of both infinities."""
    signed, unsigned = (np.dtype(f"{kind}{dtype.itemsize}") for kind in "iu")
    plus, minus = np.array([np.inf, -np.inf], dtype).view(unsigned).tolist()
    return signed, unsigned, plus, minus


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an empty array that JAX does not copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def to_torch_names(params: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return a checkpoint's tensors from our parameters: the inverse of `from_torch_names`."""
    tensors = {}
    for path, value in flatten_params(params).items():
        tensor = locate(path, value.shape, names)
        layers = [np.asarray(value)] if tensor.depth is None else np.asarray(value)
        for name, layer in zip(tensor.names(), layers, strict=True):
            layer = layer.astype(np.int64) if layer.dtype == np.int32 else layer
            tensors[name] = np.asarray(tensor.to_torch(layer), order="C")
    return tensors
