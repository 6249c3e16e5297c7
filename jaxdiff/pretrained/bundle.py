"""A trained model in memory, and as a folder of this package.

config.json            the specification
model.safetensors      weights, each at its path in the tree of parameters
tokenizers/NAME/       tokenizer.json, one per text encoder
recipe.json            how it was trained; for the record, never needed to load it
base.json              the model that the weights are adapters of (`adapted_folder`)
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import PyTree
from numpy.typing import DTypeLike
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from jaxdiff.config.serialization import from_json, to_json
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.io.files import read_bytes, write_whole
from jaxdiff.io.text import format_json
from jaxdiff.models.autoencoders.base import AutoencoderSpec
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.models.lora import factors, fits
from jaxdiff.models.text_encoders.clip import Clip, ClipConfig
from jaxdiff.models.text_to_image import AnyAutoencoder, TextToImage
from jaxdiff.pretrained.placement import Place, place_tree

CONFIG, MODEL, RECIPE, BASE, TOKENIZERS, CHECKPOINTS = (
    "config.json",
    "model.safetensors",
    "recipe.json",
    "base.json",
    "tokenizers",
    "checkpoints",
)

AnySpec = TextToImage | ClipConfig | AnyAutoencoder

# `safetensors.numpy` does not read bfloat16.
_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Bundle(NamedTuple):
    """A trained model.

    Attributes:
      spec: the model without its weights, an `AnySpec`.
      params: its weights, a nested dict (see `models/text_to_image.py`).
      tokenizers: by the names of the text encoders; empty for models without text.
    """

    spec: Any
    params: PyTree
    tokenizers: Mapping[str, TextTokenizer]


def spec_from_json(data: Any, types: Sequence[type] = ()) -> AnySpec:
    """Return the specification that `to_json` wrote.

    Args:
      data: what `json.loads` returned.
      types: dataclasses that are accepted beside those of this package.

    Raises:
      UserError: it describes no model of this version.
    """
    return from_json(AnySpec, data, types=types)


def model_name(spec: AnySpec) -> str:
    """Return the name of a model for messages."""
    return spec.name if isinstance(spec, TextToImage) else type(spec).__name__


def abstract_of(spec: AnySpec) -> dict[str, Any]:
    """Return shapes and types of a model's parameters, without adapters and added tokens."""
    if isinstance(spec, TextToImage):
        return spec.abstract_params()
    make = Clip if isinstance(spec, ClipConfig) else type(spec).build
    return abstract_params(bind_init(make, spec))


def write_bundle(
    folder: epath.PathLike,
    bundle: Bundle,
    dtype: str = "bfloat16",
    recipe: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> None:
    """Write a model's folder; the specification comes last and marks it as complete.

    Args:
      folder: to write into.
      bundle: the model.
      dtype: that weights are rounded to.
      recipe: how it was trained, as JSON.
      base: the model whose weights and tokenizers the folder lacks; the bundle has the adapters.

    Raises:
      UserError: the folder is that of a run.
    """
    root = epath.Path(folder)
    if (root / CHECKPOINTS).exists():
        raise UserError(
            f"{folder} is the folder of a run: expected another one; an exported model would hide "
            "its checkpoints."
        )
    for name in (CONFIG, RECIPE, BASE):
        (root / name).unlink(missing_ok=True)
    write_weights(root / MODEL, bundle.params, dtype)
    write_tokenizers(root, bundle.tokenizers)
    if recipe is not None:
        write_json(root / RECIPE, recipe)
    if base is not None:
        write_json(root / BASE, {"model": base})
    write_json(root / CONFIG, to_json(bundle.spec))


def read_exported(
    folder: epath.PathLike, data: Any, place: Place, types: Sequence[type] = ()
) -> Bundle:
    """Read the folder that `write_bundle` wrote, with weights in float32.

    Args:
      folder: of the model.
      data: its `config.json`.
      place: called with each parameter, such as to move it to a device.
      types: dataclasses that are accepted beside those of this package.

    Raises:
      UserError: the folder is damaged, or its weights do not match its specification.
    """
    root, spec = epath.Path(folder), spec_from_json(data, types)
    params = read_weights(root / MODEL)
    check_params(params, spec, str(folder))
    return Bundle(spec, place_tree(place, params), read_exported_tokenizers(root, spec))


def write_json(path: epath.Path, value: Any) -> None:
    """Write JSON for people to read."""
    write_whole(path, (format_json(value, indent=2) + "\n").encode())


def write_tokenizers(folder: epath.PathLike, tokenizers: Mapping[str, TextTokenizer]) -> None:
    """Write `tokenizers/NAME/tokenizer.json` into a model's folder."""
    for name, tokenizer in tokenizers.items():
        tokenizer.save(str(epath.Path(folder) / TOKENIZERS / name))


def read_exported_tokenizers(folder: epath.PathLike, spec: AnySpec) -> dict[str, TextTokenizer]:
    """Read the tokenizers of a model's text encoders; {} where its folder has none."""
    root = epath.Path(folder) / TOKENIZERS
    if not root.exists():
        return {}
    if isinstance(spec, TextToImage):
        return dict(spec.conditioner.load_tokenizers(str(root)))
    return {"text": Tokenizer.load(str(root / "text"))} if isinstance(spec, ClipConfig) else {}


def write_weights(path: epath.Path, params: PyTree, dtype: str | None = "float32") -> None:
    """Write a tree as one safetensors file, as `path.to.leaf`.

    Args:
      path: of the file.
      params: the tree.
      dtype: that floats are rounded to; None keeps their types.
    """
    arrays = {key: np.asarray(jax.device_get(leaf)) for key, leaf in _flatten(params).items()}
    if dtype is not None:
        arrays = {k: x if x.dtype == np.int32 else x.astype(dtype) for k, x in arrays.items()}
    write_whole(path, save({key: np.asarray(x, order="C") for key, x in arrays.items()}))


def read_weights(path: epath.Path, *, widen: bool = True) -> dict[str, Any]:
    """Read the tree of `write_weights`, with floats in float32, or in their types unless `widen`.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    data = read_bytes(path, "the whole folder of the model")
    try:
        stored = deserialize(data)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut off ({error}): copy it again.") from error
    tree = {}
    for key, tensor in stored:
        names = tuple(map(as_index, key.split(".")))
        if (tensor["dtype"], tensor["shape"]) == ("I32", []):  # a counter
            tree[names] = np.array(np.frombuffer(tensor["data"], np.int32)[0])
            continue
        if tensor["dtype"] not in _FLOATS:
            raise UserError(
                f"{path} holds {tensor['dtype']} in {key}: expected {', '.join(_FLOATS)}; export "
                "the model again."
            )
        value = np.frombuffer(tensor["data"], _FLOATS[tensor["dtype"]]).reshape(tensor["shape"])
        tree[names] = value.astype(np.float32) if widen else value
    for names in tree:
        for end in range(1, len(names)):
            if names[:end] in tree:
                within, name = (".".join(map(str, path)) for path in (names[:end], names))
                raise UserError(
                    f"{path} holds both {within} and {name}: expected a tensor, or those within "
                    "it; copy the model again."
                )
    return nnx.traversals.unflatten_mapping(tree)


def as_index(name: str) -> int | str:
    """Return the name of a module in a list, which is its index, as a number."""
    return int(name) if re.fullmatch("0|[1-9][0-9]{0,8}", name) else name


def _flatten(tree: PyTree) -> dict[str, Any]:
    """Return `{"path.to.leaf": leaf}`."""
    flat = nnx.traversals.flatten_mapping(tree)
    return {".".join(map(str, path)): leaf for path, leaf in flat.items()}


def check_params(params: Mapping[str, Any], spec: AnySpec, folder: str) -> None:
    """Check that weights match a specification, adapters and added tokens included.

    Raises:
      UserError: some are missing, unexpected or of another shape; it names them.
    """
    abstract = abstract_of(spec)
    extra = ("adapters", "added_tokens") if isinstance(spec, TextToImage) else ()
    check_fit({key: part for key, part in params.items() if key not in extra}, abstract, folder)
    wrong = [f"{k} is not expected" for k in extra if not isinstance(params.get(k, {}), Mapping)]
    _raise_if_wrong(wrong, folder)
    for path, pair in factors(params.get("adapters", {}) if extra else {}).items():
        node: Any = abstract
        for name in (*path, "kernel"):
            node = node.get(name, {}) if isinstance(node, Mapping) else {}
        if not hasattr(node, "shape") or not fits(pair, node.shape):
            wrong.append(f"adapters.{'.'.join(map(str, path))} fits no layer")
    for name, rows in (params.get("added_tokens", {}) if extra else {}).items():
        table = abstract["text_encoders"].get(name, {}).get("token_embedding")
        if table is None or getattr(rows, "shape", ())[1:] != table.shape[1:]:
            wrong.append(f"added_tokens.{name} fits no text encoder")
    _raise_if_wrong(wrong, folder)


def check_fit(params: PyTree, abstract: PyTree, folder: str) -> None:
    """Check weights against expected shapes.

    Raises:
      UserError: some are missing, unexpected or of another shape; it names them.
    """
    have, want = _flatten(params), _flatten(abstract)
    wrong = [f"{k} is missing" for k in want if k not in have]
    wrong += [f"{k} is not expected" for k in have if k not in want]
    wrong += [
        f"{k} is of shape {tuple(have[k].shape)}, not {tuple(want[k].shape)}"
        for k in want
        if k in have and tuple(have[k].shape) != tuple(want[k].shape)
    ]
    _raise_if_wrong(wrong, folder)


def _raise_if_wrong(wrong: list[str], folder: str) -> None:
    if wrong:
        raise UserError(
            f"The weights in {folder} do not match its specification: {'; '.join(wrong[:3])}"
            f"{' ...' if len(wrong) > 3 else ''}; restore its config.json, or export it again."
        )


def part_of(bundle: Bundle, path: tuple[str, ...], folder: str) -> Any:
    """Return the parameters of one part of a model.

    Args:
      bundle: of a text-to-image model, a CLIP, or an autoencoder.
      path: of the part in a text-to-image model. A CLIP's text encoder serves as any of
        `text_encoders`, and an autoencoder as `autoencoder`.
      folder: of the model, for messages.

    Raises:
      UserError: the model has no such part.
    """
    node = bundle.params
    if isinstance(bundle.spec, ClipConfig) and path[:1] == ("text_encoders",):
        path = ("text", *path[2:])
    elif isinstance(bundle.spec, AutoencoderSpec) and path[:1] == ("autoencoder",):
        path = path[1:]
    for name in path:
        if not isinstance(node, Mapping) or name not in node:
            raise UserError(
                f"The model in {folder} has no part {'.'.join(path)!r}: expected a model with it; "
                "give another folder."
            )
        node = node[name]
    return node


def exported_fingerprint(params: PyTree) -> str:
    """Return the fingerprint of weights in bfloat16, which a run shares with its exports."""
    return weights_fingerprint(params, dtype=ml_dtypes.bfloat16)


def weights_fingerprint(params: PyTree, *, dtype: DTypeLike | None = None) -> str:
    """SHA-256, in hex, over names and bytes of a model's weights, or of them in a float type."""
    digest = hashlib.sha256()
    for key, leaf in sorted(_flatten(params).items()):
        digest.update(key.encode())
        for array in jax.tree.leaves(jax.device_get(leaf)):
            if dtype is not None and array.dtype != np.int32:
                array = np.asarray(array, dtype)
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
