"""A trained model as a folder: what is loaded to sample, and what ships with the package.

    config.json         the recipe
    tokenizer.json      where the model reads text
    model.safetensors   params.* of what was trained, frozen.* of the parts it was trained with

A run's folder has the first two as well, its weights in `checkpoints/`, and `frozen.safetensors`
where it was trained with frozen parts: these are stored once, not in every checkpoint.

Wherever a folder of a model is asked for, `shipped:NAME` is one that comes with jaxdiff, and
OWNER/NAME, where there is no such folder, one of the Hugging Face hub.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import PyTree
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.io.files import write_whole
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.pretrained import diffusers as diffusers_folder
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.clip_folder import is_clip_folder, read_clip_folder
from jaxdiff.pretrained.diffusers import is_diffusers_folder, read_diffusers
from jaxdiff.pretrained.hub import download, download_tokenizer, is_hub_id
from jaxdiff.pretrained.safetensors_io import to_device
from jaxdiff.pretrained.single_file import read_original
from jaxdiff.training.checkpoint import load_params
from jaxdiff.training.recipe import Config, from_json, to_json
from jaxdiff.training.tasks.base import Pretrained

CONFIG, MODEL, FROZEN, CACHE, CHECKPOINTS = (
    "config.json",
    "model.safetensors",
    "frozen.safetensors",
    "latents",
    "checkpoints",
)

SHIPPED = epath.Path(__file__).parent.parent / "weights"

# What `safetensors.numpy` reads lacks bfloat16.
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def model_folder(model: epath.PathLike) -> epath.Path:
    """The folder of a model: the path as it is, or where `shipped:NAME` or a hub's model lies.

    Raises:
      UserError: no model of that name comes with jaxdiff, or can be had from the hub.
    """
    kind, _, name = str(model).partition(":")
    if kind != "shipped":
        return download(str(model)) if is_hub_id(str(model)) else epath.Path(model)
    names = sorted(path.name for path in SHIPPED.iterdir() if (path / CONFIG).exists())
    if name not in names:
        raise UserError(
            f"There is no model {model}: with jaxdiff come shipped:{', shipped:'.join(names)}."
        )
    return SHIPPED / name


def read_config(folder: epath.PathLike) -> Config:
    """The recipe in a run's or a bundle's folder.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = model_folder(folder) / CONFIG
    try:
        return from_json(Config, json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} holds no model: expected {CONFIG} in it, as the folder of a run or an "
            "exported model has; check the path."
        ) from error
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"{path} is not valid JSON ({error}); restore it.") from error


def make_folder(folder: epath.PathLike) -> epath.Path:
    """A folder to write into, made if there is none.

    Raises:
      UserError: it cannot be made: a file is in its place, or the place may not be written to.
    """
    path = epath.Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{folder} cannot be made a folder ({reason}): choose another one to write into."
        ) from error
    return path


def write_config(folder: epath.PathLike, config: Config) -> None:
    """Writes the recipe into a run's or a bundle's folder."""
    text = json.dumps(to_json(config), indent=2) + "\n"
    write_whole(epath.Path(folder) / CONFIG, text.encode())


def write_weights(path: epath.Path, dtype: str = "float32", **trees: PyTree) -> None:
    """Trees of floats in one safetensors file, as `tree.path.to.leaf`, rounded to `dtype`."""
    flat = {}
    for name, tree in trees.items():
        for key, leaf in _flatten(tree).items():
            value = np.asarray(jax.device_get(leaf))
            flat[f"{name}.{key}"] = value.astype(dtype, order="C")
    write_whole(path, save(flat))


def read_weights(path: epath.Path) -> dict[str, PyTree]:
    """The trees of `write_weights`, in float32.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    try:
        stored = deserialize(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; copy the whole folder of the model.") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut off ({error}); copy it anew.") from error
    tree = {}
    for key, tensor in stored:
        if tensor["dtype"] not in FLOATS:
            raise UserError(
                f"{path} holds {tensor['dtype']} in {key}: expected {', '.join(FLOATS)}."
            )
        value = np.frombuffer(tensor["data"], FLOATS[tensor["dtype"]]).reshape(tensor["shape"])
        names = (int(name) if name.isdigit() else name for name in key.split("."))
        tree[tuple(names)] = value.astype(np.float32)
    return nnx.traversals.unflatten_mapping(tree)


def _flatten(tree: PyTree) -> dict[str, Any]:
    """`{"path.to.leaf": leaf}`; the members of a list of modules go by their number."""
    flat = nnx.traversals.flatten_mapping(tree)
    return {".".join(map(str, path)): leaf for path, leaf in flat.items()}


def write_bundle(folder: epath.PathLike, bundle: Bundle, dtype: str = "bfloat16") -> None:
    """Writes a model's folder, its recipe last: a folder with a recipe is whole.

    Raises:
      UserError: the folder is that of a run.
    """
    root = epath.Path(folder)
    if (root / CHECKPOINTS).exists():
        raise UserError(
            f"{folder} is the folder of a run, whose checkpoints an exported model would hide: "
            "choose another one to write into."
        )
    (root / CONFIG).unlink(missing_ok=True)
    write_weights(root / MODEL, dtype, params=bundle.params, frozen=bundle.frozen)
    if bundle.tokenizer is not None:
        bundle.tokenizer.save(str(root))
    write_config(root, bundle.config)


def read_bundle(
    folder: epath.PathLike, *, place: Callable[[np.ndarray], Any] = to_device
) -> Bundle:
    """A trained model, with the moving average of a run's newest checkpoint as its weights.

    From the folder of a bundle, of a run, of a Stable Diffusion checkpoint as diffusers has it or
    of a CLIP as transformers has it; or from such a checkpoint as one safetensors file in its
    original layout. Of what others have written each parameter goes through `place`.

    Raises:
      UserError: the folder holds no model, a damaged one, or one that its recipe does not describe.
    """
    root = model_folder(folder)
    if is_diffusers_folder(root):
        return read_diffusers(root, place=place)
    if root.suffix == ".safetensors":
        return read_original(root, place=place)
    if is_clip_folder(root):
        return read_clip_folder(root, place=place)
    config = read_config(folder)
    abstract = abstract_weights(config)
    if (root / MODEL).exists():
        trees = read_weights(root / MODEL)
        params, frozen = trees.get("params", {}), trees.get("frozen", {})
    else:
        params, _ = load_params(root / CHECKPOINTS, abstract["params"])
        frozen = read_weights(root / FROZEN) if (root / FROZEN).exists() else {}
    check_fit({"params": params, "frozen": frozen}, abstract, str(folder))
    tokenizer = Tokenizer.load(str(root)) if (root / "tokenizer.json").exists() else None
    return Bundle(config, params, frozen, tokenizer)


def abstract_weights(config: Config) -> dict[str, PyTree]:
    """Shapes and types of what a recipe trains, `params`, and of its `frozen` parts as stored."""
    return {
        "params": abstract_params(bind_init(type(config.task).build, config.task)),
        "frozen": {name: abstract_params(p.build) for name, p in config.task.frozen().items()},
    }


def read_tokenizer(folder: epath.PathLike) -> Tokenizer:
    """The tokenizer of a model, of whatever `read_bundle` takes.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    root = model_folder(folder)
    if is_diffusers_folder(root):
        return diffusers_folder.read_tokenizer(root)
    if root.suffix == ".safetensors":
        return Tokenizer.load(str(download_tokenizer()))
    return Tokenizer.load(str(root))


def read_pretrained(wanted: Mapping[str, Pretrained]) -> dict[str, PyTree]:
    """The weights of the parts that a task takes over, from the folders that it names, or as drawn.

    On the host: where they go is the business of whoever takes them over.

    Raises:
      UserError: a folder holds no such part, or one of another size.
    """
    folders = {part.folder for part in wanted.values() if part.folder is not None}
    bundles = {folder: read_bundle(folder, place=np.asarray) for folder in folders}
    parts = {}
    for name, part in wanted.items():
        if part.folder is None:
            parts[name] = jax.device_get(nnx.to_pure_dict(nnx.split(part.build())[1]))
            continue
        bundle = bundles[part.folder]
        # An autoencoder is the whole of its own model, and a frozen part of one that draws.
        params: Any = {**bundle.frozen, **bundle.params}
        for key in part.part or ((name,) if name in bundle.frozen else ()):
            if key not in params:
                raise UserError(
                    f"The model in {part.folder} has no part {key!r} to serve as {name}."
                )
            params = params[key]
        abstract = abstract_params(part.build)
        check_fit(params, abstract, part.folder)
        # Weights may be stored in half precision, which those in training must not be in.
        parts[name] = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), params, abstract)
    return parts


def check_fit(params: PyTree, abstract: PyTree, folder: str) -> None:
    """Raises `UserError` naming weights that are missing, unexpected or of another shape."""
    have, want = _flatten(params), _flatten(abstract)
    wrong = [f"{k} is missing" for k in want if k not in have]
    wrong += [f"{k} is not expected" for k in have if k not in want]
    wrong += [
        f"{k} is of shape {have[k].shape}, not {want[k].shape}"
        for k in want
        if k in have and tuple(have[k].shape) != tuple(want[k].shape)
    ]
    if wrong:
        raise UserError(
            f"The weights in {folder} are not those of its recipe: {'; '.join(wrong[:3])}"
            f"{' ...' if len(wrong) > 3 else ''}; was config.json changed?"
        )


def weights_fingerprint(params: PyTree) -> str:
    """SHA-256, in hex, over names and bytes of a model's weights."""
    digest = hashlib.sha256()
    for key, leaf in sorted(_flatten(params).items()):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()
