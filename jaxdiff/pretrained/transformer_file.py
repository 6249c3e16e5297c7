"""The transformer of FLUX or Z-Image in one file, which serves as a model's denoiser.

Text encoders, tokenizers, autoencoder and scheduler are those of its base.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.flux import FluxConfig
from jaxdiff.models.denoisers.z_image import ZImageConfig
from jaxdiff.models.text_to_image import AnyDenoiser
from jaxdiff.pretrained.flux_original import FLUX_MARKS, open_flux_file, read_flux_file
from jaxdiff.pretrained.original_layout import prefix_of
from jaxdiff.pretrained.placement import Place
from jaxdiff.pretrained.safetensors_io import Renamed, TensorFiles, to_device
from jaxdiff.pretrained.z_image_original import (
    Z_IMAGE_MARKS,
    open_z_image_file,
    read_z_image_file,
)


class _Kind(NamedTuple):
    """A kind of transformer: its name, its config, and how its files are recognised and read."""

    name: str
    config: type
    marks: tuple[str, ...]
    open: Callable[..., tuple[Any, Renamed]]
    read: Callable[..., tuple[Any, dict[str, Any]]]


_KINDS = (
    _Kind("FLUX", FluxConfig, FLUX_MARKS, open_flux_file, read_flux_file),
    _Kind("Z-Image", ZImageConfig, Z_IMAGE_MARKS, open_z_image_file, read_z_image_file),
)


def is_transformer_file(file: epath.PathLike) -> bool:
    """Whether a file is safetensors with a transformer of FLUX or Z-Image.

    Raises:
      UserError: the file is missing or damaged.
    """
    return epath.Path(file).suffix.lower() == ".safetensors" and _kind(file) is not None


def read_transformer_file(file: epath.PathLike, *, place: Place = to_device) -> dict[str, Any]:
    """Read a denoiser's parameters, with tensors in their stored type.

    Args:
      file: for which `is_transformer_file` is true.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: tensors are missing, unexpected or of another shape.
    """
    kind = _kind(file)
    assert kind is not None
    return kind.read(file, place=place)[1]


def open_transformer_file(
    file: epath.PathLike, config: AnyDenoiser, base: epath.PathLike
) -> Mapping[str, np.ndarray]:
    """Open the tensors of a denoiser whose config is known, under diffusers' names.

    Args:
      file: for which `is_transformer_file` is true.
      config: of the denoiser.
      base: where its config comes from, for messages.

    Raises:
      UserError: the transformer is of another family than the config.
    """
    kind = _kind(file)
    assert kind is not None
    if not isinstance(config, kind.config):
        raise UserError(
            f"{file} holds a {kind.name} transformer, and {base} is no {kind.name}: expected a "
            "base of the same family; name the model that the transformer was made from."
        )
    return kind.open(file, config)[1]


def refuse_transformer_file(file: epath.PathLike) -> None:
    """Raise `UserError` for a file with a transformer, which is not a whole model."""
    if is_transformer_file(file):
        raise UserError(
            f"{file} holds a transformer of FLUX or Z-Image, without the text encoders and "
            "tokenizers of a whole model: expected a base too, the folder or hub id of the model "
            "that it was made from; add --base (base= in Python), or train from this file by "
            "--task.pretrained.denoiser."
        )


def _kind(file: epath.PathLike) -> _Kind | None:
    names = TensorFiles([epath.Path(file)]).shapes
    found = (kind for kind in _KINDS if prefix_of(names, kind.marks) is not None)
    return next(found, None)
