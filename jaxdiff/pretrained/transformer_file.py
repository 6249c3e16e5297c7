"""The transformer of FLUX or Z-Image in one file, which serves as a model's denoiser.

The rest of the model, its text encoders, tokenizers and autoencoder, comes from elsewhere.
"""

from collections.abc import Callable
from typing import Any

from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.pretrained.flux_original import FLUX_MARKS, read_flux_file
from jaxdiff.pretrained.original_layout import prefix_of
from jaxdiff.pretrained.placement import Place
from jaxdiff.pretrained.safetensors_io import TensorFiles, to_device
from jaxdiff.pretrained.z_image_original import Z_IMAGE_MARKS, read_z_image_file

_READERS = ((FLUX_MARKS, read_flux_file), (Z_IMAGE_MARKS, read_z_image_file))


def is_transformer_file(file: epath.PathLike) -> bool:
    """Whether a file is safetensors with a transformer of FLUX or Z-Image.

    Raises:
      UserError: the file is missing or damaged.
    """
    return epath.Path(file).suffix.lower() == ".safetensors" and _reader(file) is not None


def read_transformer_file(file: epath.PathLike, *, place: Place = to_device) -> dict[str, Any]:
    """Read a denoiser's parameters, with tensors in their stored type.

    Args:
      file: for which `is_transformer_file` is true.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: tensors are missing, unexpected or of another shape.
    """
    read = _reader(file)
    assert read is not None
    return read(file, place=place)[1]


def refuse_transformer_file(file: epath.PathLike) -> None:
    """Raise `UserError` for a file with a transformer, which is not a whole model."""
    if is_transformer_file(file):
        raise UserError(
            f"{file} holds a transformer of FLUX or Z-Image, without the tokenizers of a whole "
            "model: expected the folder of its pipeline; load that, or train from this file by "
            "--task.pretrained.denoiser."
        )


def _reader(file: epath.PathLike) -> Callable[..., tuple[Any, dict[str, Any]]] | None:
    names = TensorFiles([epath.Path(file)]).shapes
    found = (read for marks, read in _READERS if prefix_of(names, marks) is not None)
    return next(found, None)
