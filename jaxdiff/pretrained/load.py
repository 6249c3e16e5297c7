"""Load a trained model of any supported format.

A model is a folder, a file, `shipped:NAME` for one that comes with jaxdiff, or OWNER/NAME, where
there is no such folder, for one of the Hugging Face hub.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree

from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.errors import UserError
from jaxdiff.io.files import check_address
from jaxdiff.io.text import read_json
from jaxdiff.pretrained import (
    adapted_folder,
    autoencoder_file,
    autoencoder_folder,
    clip_folder,
    diffusers_folder,
    single_file,
)
from jaxdiff.pretrained.bundle import (
    CONFIG,
    AnySpec,
    Bundle,
    check_fit,
    part_of,
    read_exported,
    read_exported_tokenizers,
    spec_from_json,
)
from jaxdiff.pretrained.hub import download, is_hub_id
from jaxdiff.pretrained.placement import Place
from jaxdiff.pretrained.run_folder import is_recipe, read_run, read_run_spec
from jaxdiff.pretrained.safetensors_io import to_device
from jaxdiff.pretrained.transformer_file import (
    is_transformer_file,
    read_transformer_file,
    refuse_transformer_file,
)

SHIPPED = epath.Path(__file__).parent.parent / "weights"

Key = TypeVar("Key")


class PartSource(NamedTuple):
    """The source of the weights of one part of a model.

    Attributes:
      folder: a model, as for `load_bundle`; for a denoiser, also a file with its transformer.
      path: of the part in the parameters of a text-to-image model.
      abstract: shapes and types that are expected.
    """

    folder: str
    path: tuple[str, ...]
    abstract: PyTree


def model_folder(model: epath.PathLike) -> epath.Path:
    """Return the path of a model; models of the hub are downloaded.

    Raises:
      UserError: there is no shipped model of that name, or the download fails.
    """
    check_address(str(model))
    kind, _, name = str(model).partition(":")
    if kind != "shipped":
        return download(str(model)) if is_hub_id(str(model)) else epath.Path(model)
    names = sorted(path.name for path in SHIPPED.iterdir() if (path / CONFIG).exists())
    if name not in names:
        raise UserError(
            f"There is no model {model}: expected shipped:{', shipped:'.join(names)}; name one of "
            "them, or a folder."
        )
    return SHIPPED / name


def base_folder(model: epath.PathLike, base: epath.PathLike) -> epath.Path:
    """Return the folder of the base of a transformer file; the hub's weights of it are not fetched.

    Raises:
      UserError: the model is no such file, or there is no such base.
    """
    for path in (model, base):
        check_address(str(path))
    if not is_transformer_file(model):
        raise UserError(
            "A base goes with a .safetensors file that holds a transformer of FLUX or Z-Image, "
            f"which {model} is not: leave the base out."
        )
    hub = is_hub_id(str(base))
    root = download(str(base), without="transformer") if hub else epath.Path(base)
    if not diffusers_folder.is_diffusers_folder(root):
        raise UserError(
            f"{base} is no base: expected a folder of diffusers, with model_index.json, or a hub "
            "id OWNER/NAME of one; check the path."
        )
    return root


def load_bundle(
    folder: epath.PathLike,
    *,
    base: epath.PathLike | None = None,
    place: Place = to_device,
    types: Sequence[type] = (),
) -> Bundle:
    """Load a trained model.

    Args:
      folder: of an exported model, of a run (its weights are the moving average of its newest
        undamaged checkpoint), of a pipeline or an autoencoder of diffusers, or of a CLIP of
        transformers; one safetensors file in Stable Diffusion's original layout, or of FLUX's
        autoencoder alone;
        `shipped:NAME`; or a model of the hub. With a base, a file with a transformer.
      base: folder of diffusers or hub id whose other parts complete such a file.
      place: called with each parameter, such as to move it to a device.
      types: dataclasses, such as a network of yours, that the specification may name.

    Raises:
      UserError: there is no model, it is damaged, or its weights do not fit its specification.
    """
    if base is not None:
        file, root = epath.Path(folder), base_folder(folder, base)
        return diffusers_folder.read_diffusers(root, file, place=place)
    root = model_folder(folder)
    if diffusers_folder.is_diffusers_folder(root):
        return diffusers_folder.read_diffusers(root, place=place)
    if root.suffix.lower() == ".safetensors":
        if autoencoder_file.is_autoencoder_file(root):
            return Bundle(*autoencoder_file.read_autoencoder_file(root, place=place), {})
        refuse_transformer_file(root)
        return single_file.read_original(root, place=place)
    data = _config(root, folder)
    if clip_folder.is_clip_config(data):
        return clip_folder.read_clip_folder(root, place=place)
    if autoencoder_folder.is_autoencoder_config(data):
        return Bundle(*autoencoder_folder.read_autoencoder_folder(root, place=place), {})
    if adapted_folder.is_adapted_folder(root):
        base_model = adapted_folder.base_name(root, model_folder)
        load_base = functools.partial(load_bundle, base_model, place=np.asarray, types=types)
        return adapted_folder.read_adapted_folder(root, data, place, types, load_base)
    read = read_run if is_recipe(data) else read_exported
    return read(root, data, place, types)


def read_spec(
    folder: epath.PathLike, types: Sequence[type] = (), base: epath.PathLike | None = None
) -> AnySpec:
    """Read a model's specification, as for `load_bundle`, without its weights.

    Raises:
      UserError: there is no model, or its description cannot be read.
    """
    if base is not None:
        file, root = epath.Path(folder), base_folder(folder, base)
        return diffusers_folder.read_diffusers_spec(root, file)
    root = model_folder(folder)
    if diffusers_folder.is_diffusers_folder(root):
        return diffusers_folder.read_diffusers_spec(root)
    if root.suffix.lower() == ".safetensors":
        if autoencoder_file.is_autoencoder_file(root):
            return autoencoder_file.read_autoencoder_file_spec(root)
        refuse_transformer_file(root)
        return single_file.read_original_spec(root)
    data = _config(root, folder)
    if clip_folder.is_clip_config(data):
        return clip_folder.read_clip_spec(root)
    if autoencoder_folder.is_autoencoder_config(data):
        return autoencoder_folder.read_autoencoder_spec(root)
    return read_run_spec(root, data, types) if is_recipe(data) else spec_from_json(data, types)


def read_tokenizers(
    folder: epath.PathLike, types: Sequence[type] = ()
) -> Mapping[str, TextTokenizer]:
    """Read a model's tokenizers, as for `load_bundle`, without its weights.

    Raises:
      UserError: they cannot be read.
    """
    root, spec = model_folder(folder), read_spec(folder, types)
    if diffusers_folder.is_diffusers_folder(root):
        return diffusers_folder.read_diffusers_tokenizers(root)
    if root.suffix.lower() == ".safetensors":
        return single_file.read_original_tokenizers(root)
    if clip_folder.is_clip_config(_config(root, folder)):
        return clip_folder.read_clip_tokenizers(root)
    if adapted_folder.is_adapted_folder(root):
        return read_tokenizers(adapted_folder.base_name(root, model_folder), types)
    return read_exported_tokenizers(root, spec)


def read_parts(
    wanted: Mapping[Key, PartSource], types: Sequence[type] = (), *, widen: bool = True
) -> dict[Key, PyTree]:
    """Read parts of trained models, on the host.

    Args:
      wanted: their sources.
      types: dataclasses that a specification may name beside those of this package.
      widen: return arrays in the expected types, as of weights to train, not in the stored ones.

    Raises:
      UserError: a model has no such part, or one of another size.
    """
    bundles: dict[str, Bundle] = {}

    def read(source: PartSource) -> PyTree:
        if source.path == ("denoiser",) and is_transformer_file(source.folder):
            return read_transformer_file(source.folder, place=np.asarray)
        if source.folder not in bundles:
            bundles[source.folder] = load_bundle(source.folder, place=np.asarray, types=types)
        return part_of(bundles[source.folder], source.path, source.folder)

    parts = {}
    for key, source in wanted.items():
        params = read(source)
        check_fit(params, source.abstract, source.folder)
        # Scalars, which no compute type rounds, always have the expected type.
        parts[key] = jax.tree.map(
            lambda x, like: np.asarray(x, None if x.ndim and not widen else like.dtype),
            params,
            source.abstract,
        )
    return parts


def _config(root: epath.Path, folder: epath.PathLike) -> Any:
    if root.is_file():
        raise UserError(
            f"{folder} holds no model that jaxdiff opens: expected a folder or a .safetensors "
            "file, as others can run code, such as .ckpt and .pt, or are quantised, such as .gguf; "
            "convert it."
        )
    if not (root / CONFIG).exists():
        raise UserError(
            f"{folder} holds no model: expected {CONFIG} in it, as the folder of a run or an "
            "exported model has; check the path."
        )
    return read_json(root / CONFIG)
