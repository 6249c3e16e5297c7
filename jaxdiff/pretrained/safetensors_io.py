"""Read the tensors of a checkpoint on disk one at a time, and write its files."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxdiff.errors import UserError
from jaxdiff.io.files import is_local, write_whole
from jaxdiff.io.text import parse_json, read_json

Shape = tuple[int, ...]
Cut = Callable[[np.ndarray], np.ndarray]  # a tensor to a part of it, determined by the shape

VARIANTS = ("", ".fp16", ".bf16")
"""Marks in the names of weights that come in several precisions; the first there is read."""

_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""Number types of a safetensors file, by the format's names."""


_GGUF = "GGUF's quantised weights, which jaxdiff does not read"


class _Place(NamedTuple):
    """The location of a tensor."""

    file: epath.Path
    first: int  # byte of the file
    dtype: np.dtype
    shape: Shape


class TensorFiles(Mapping[str, np.ndarray]):
    """Memory-mapped tensors of one or several safetensors files, by name.

    Only headers are kept. A tensor's memory map lives as long as its array.

    Raises:
      UserError: a file is missing or damaged, of an unknown number type, or repeats a tensor of
        another file.
    """

    def __init__(self, files: list[epath.Path], more_types: Mapping[str, Any] | None = None):
        """`more_types` are number types by the format's names, read beside `_TYPES`."""
        self.files = files
        self._places: dict[str, _Place] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            self.metadata |= _check(file)
            places = _places(file, {**_TYPES, **(more_types or {})})
            if twice := set(places) & set(self._places):
                raise UserError(
                    f"{file} repeats {min(twice)} of another shard: expected each tensor in one "
                    "file; copy the whole folder again."
                )
            self._places |= places
        self.shapes: dict[str, Shape] = {name: at.shape for name, at in self._places.items()}
        self.dtypes: dict[str, np.dtype] = {name: at.dtype for name, at in self._places.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        file, first, dtype, shape = self._places[name]
        if not math.prod(shape):
            return np.empty(shape, dtype)  # an empty range cannot be mapped
        # Writes to the array, such as JAX's to a donated one, do not reach the file.
        return np.asarray(np.memmap(str(file), dtype, "c", first, shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Renamed(Mapping[str, np.ndarray]):
    """Tensors under other names, or parts of them, each read when it is accessed."""

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        rename: Callable[[str], str | Mapping[str, Cut | None] | None],
    ):
        """Rename tensors.

        Args:
          tensors: by their old names.
          rename: returns a tensor's new name, or the parts to cut it into (None: all of it), or
            None to drop it.

        Raises:
          UserError: two tensors have one new name.
        """
        self._tensors = tensors
        self._parts: dict[str, tuple[str, Cut | None]] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, np.dtype] = {}
        types = dtypes(tensors)
        for old, shape in shapes(tensors).items():
            new = rename(old)
            parts = {new: None} if isinstance(new, str) else new or {}
            for name, cut in parts.items():
                if name in self._parts:
                    raise UserError(
                        f"checkpoint: {self._parts[name][0]} and {old} are the same tensor, "
                        f"{name}: expected it once; copy the model again."
                    )
                self._parts[name] = old, cut
                whole = np.broadcast_to(np.zeros(()), shape)
                # A number, where rows are expected, is refused by its shape.
                self.shapes[name] = cut(whole).shape if cut and shape else shape
                self.dtypes[name] = types[old]

    def __getitem__(self, name: str) -> np.ndarray:
        old, cut = self._parts[name]
        return self._tensors[old] if cut is None else cut(self._tensors[old])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def write_tensors(file: epath.PathLike, tensors: Mapping[str, np.ndarray], **metadata: str) -> None:
    """Write a safetensors file as PyTorch's libraries do, with further metadata.

    Tensors keep their type.
    """
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    # transformers refuses a file without this format.
    write_whole(epath.Path(file), save(contiguous, metadata={"format": "pt", **metadata}))


def to_device(tensor: np.ndarray | jax.Array) -> jax.Array:
    """Place an array on the default device; JAX arrays keep theirs.

    The host's copy is free when this returns.
    """
    if isinstance(tensor, jax.Array):
        return tensor
    # JAX would compile a transposition for every shape that is not in C order.
    return jax.block_until_ready(jax.device_put(np.asarray(tensor, order="C")))


def to_linear(kernel: np.ndarray) -> np.ndarray:
    """Return a 1x1 convolution as the linear layer that it is; others unchanged."""
    return kernel.reshape(kernel.shape[:2]) if kernel.shape[2:] == (1, 1) else kernel


def shapes(tensors: Mapping[str, np.ndarray]) -> dict[str, Shape]:
    """Return the shape of each tensor, without reading files."""
    if isinstance(tensors, TensorFiles | Renamed):
        return tensors.shapes
    return {name: np.shape(value) for name, value in tensors.items()}


def dtypes(tensors: Mapping[str, np.ndarray]) -> dict[str, np.dtype]:
    """Return the number type of each tensor, without reading files."""
    if isinstance(tensors, TensorFiles | Renamed):
        return tensors.dtypes
    return {name: value.dtype for name, value in tensors.items()}


def open_weights(folder: epath.Path, stem: str) -> TensorFiles:
    """Open the weights of one part of a diffusers or transformers folder, in one file or in shards.

    Of `VARIANTS`, the first that is there.

    Args:
      folder: of the part.
      stem: `model` or `diffusion_pytorch_model`.

    Raises:
      UserError: there are none, a file is damaged, a shard is missing, or they are pickled.
    """
    for variant in VARIANTS:
        whole = folder / f"{stem}{variant}.safetensors"
        if whole.exists():
            return TensorFiles([whole])
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.exists():
            return TensorFiles(_shards(index))
    for pattern, kind in (("*.bin", "pickled weights, which can run code"), ("*.gguf", _GGUF)):
        if folder.exists() and any(folder.glob(pattern)):
            raise UserError(
                f"{folder} holds only {kind}: expected {stem}.safetensors; use the model's "
                "safetensors variant."
            )
    raise UserError(
        f"{folder} holds no weights: expected {stem}.safetensors, its variant fp16 or bf16, "
        f"or {stem}.safetensors.index.json with its shards; copy the whole folder of the model."
    )


def _shards(index: epath.Path) -> list[epath.Path]:
    """Return the files of an index, which must be in its folder."""
    data = read_json(index, "the index of a model's shards")
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
        raise UserError(
            f"{index} is no index of shards: expected names of files under weight_map; copy it "
            "again."
        )
    names = sorted(set(shards.values()))
    for name in names:
        if not isinstance(name, str) or name != epath.Path(name).name:
            raise UserError(
                f"{index} names {name!r}, outside its folder: expected files beside it; do not "
                "trust this model."
            )
        if not (index.parent / name).exists():
            raise UserError(f"{index.parent} lacks the shard {name}: copy the whole folder.")
    return [index.parent / name for name in names]


def _check(file: epath.Path) -> dict[str, str]:
    """Check the header against the file with the format's own library; return its metadata."""
    if not is_local(file):
        raise UserError(
            f"{file} is in cloud storage, where jaxdiff reads only its own format: copy the "
            "model's folder to this machine."
        )
    try:
        with safe_open(str(file), framework="numpy") as tensors:
            return tensors.metadata() or {}
    except FileNotFoundError as error:
        raise UserError(f"There is no file {file}: check its path.") from error
    except (SafetensorError, OSError) as error:
        why = " ".join(str(error).split())  # a tensor's name may have newlines
        raise UserError(f"{file} is damaged or cut off ({why}): copy it again.") from error


def _places(file: epath.Path, types: Mapping[str, Any]) -> dict[str, _Place]:
    """Return the locations of a checked file's tensors."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = parse_json(stream.read(length), file)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in types:
            raise UserError(
                f"{file}: {name} is of type {entry['dtype']}: expected one of "
                f"{', '.join(types)}, as in files that are not quantised; use another variant of "
                "the model."
            )
    return {
        name: _Place(
            file,
            8 + length + entry["data_offsets"][0],
            np.dtype(types[entry["dtype"]]),
            tuple(entry["shape"]),
        )
        for name, entry in header.items()
    }
