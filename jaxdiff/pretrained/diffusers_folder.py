"""Folders of diffusers' pipelines: `model_index.json` names the class, and so the family."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained import stable_diffusion
from jaxdiff.pretrained.bundle import Bundle, model_name
from jaxdiff.pretrained.merging import merge_additions
from jaxdiff.pretrained.pipeline_folder import INDEX, PipelineFamily, read_part_config
from jaxdiff.pretrained.placement import Place
from jaxdiff.pretrained.safetensors_io import to_device

FAMILIES = {"Stable Diffusion": stable_diffusion.FAMILY}


def is_diffusers_folder(folder: epath.PathLike) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return (epath.Path(folder) / INDEX).exists()


def read_diffusers_spec(folder: epath.PathLike) -> TextToImage:
    """Read the specification of a model.

    Raises:
      UserError: a config is missing, or has unsupported values.
    """
    root, index, family = _open(folder)
    return family.read_spec(root, index)


def read_diffusers(folder: epath.PathLike, *, place: Place = to_device) -> Bundle:
    """Read a model, with tensors in their stored type.

    Args:
      folder: with `model_index.json`.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: a part is missing or damaged, or of an unsupported kind.
    """
    root, index, family = _open(folder)
    return family.read(root, index, place)


def read_diffusers_tokenizers(folder: epath.PathLike) -> Mapping[str, TextTokenizer]:
    """Read the tokenizers of all text encoders.

    Raises:
      UserError: one is missing or damaged.
    """
    root, index, family = _open(folder)
    return family.read_tokenizers(root, index)


def write_diffusers(folder: epath.PathLike, bundle: Bundle) -> None:
    """Write a folder that diffusers loads; the index comes last and marks it as complete.

    Tensors keep their type. Adapters and added tokens are merged into the weights.

    Raises:
      UserError: diffusers has no such model.
    """
    for family in FAMILIES.values():
        if family.holds(bundle):
            family.write(epath.Path(folder), merge_additions(bundle))
            return
    raise UserError(
        f"{model_name(bundle.spec)} is no model of diffusers: expected the networks, text encoders "
        f"with tokenizers and autoencoder of {' or '.join(FAMILIES)}; export it in another format."
    )


def _open(folder: epath.PathLike) -> tuple[epath.Path, Any, PipelineFamily]:
    """Return the folder, its index and its family."""
    root = epath.Path(folder)
    index = read_part_config(root / INDEX)
    kind = index.get("_class_name")
    for family in FAMILIES.values():
        if isinstance(kind, str) and kind in family.pipelines:
            return root, index, family
    known = [name for family in FAMILIES.values() for name in family.pipelines]
    raise UserError(
        f"{root / INDEX} names {kind}, which jaxdiff does not support: expected "
        f"{', '.join(known)}; use another model."
    )
