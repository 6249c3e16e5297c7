"""An autoencoder of diffusers by itself: `config.json`, `diffusion_pytorch_model.safetensors`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.pretrained import autoencoder, autoencoder_tiny
from jaxdiff.pretrained.config_check import read_json
from jaxdiff.pretrained.safetensors_io import open_weights, to_device

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"

PublishedAutoencoder = AutoencoderConfig | TinyAutoencoderConfig


def is_autoencoder_config(data: Any) -> bool:
    """Whether a `config.json` is that of an autoencoder of diffusers."""
    kinds = ("AutoencoderKL", autoencoder_tiny.KIND)
    return isinstance(data, dict) and data.get("_class_name") in kinds


def read_spec(folder: epath.PathLike) -> PublishedAutoencoder:
    """Read the specification of an autoencoder.

    Raises:
      UserError: the config is missing, or asks for what jaxdiff does not have.
    """
    root = epath.Path(folder)
    config, what = read_json(root / CONFIG), f"{root.name}/{CONFIG}"
    is_tiny = config.get("_class_name") == autoencoder_tiny.KIND
    return (autoencoder_tiny if is_tiny else autoencoder).read_config(config, what)


def read_autoencoder(
    folder: epath.PathLike, *, place: Callable[[np.ndarray], Any] = to_device
) -> tuple[PublishedAutoencoder, dict[str, Any]]:
    """Read an autoencoder by itself, or as a part of a checkpoint: specification and parameters.

    Args:
      folder: with `config.json` and `diffusion_pytorch_model.safetensors`.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: a file is missing or damaged, or is of a kind that jaxdiff does not have.
    """
    root = epath.Path(folder)
    spec, tensors = read_spec(root), open_weights(root, WEIGHTS)
    return spec, module_of(spec).from_torch_names(tensors, spec, place=place)


def module_of(spec: PublishedAutoencoder) -> Any:
    """Return the module with the tensor names and config keys of an autoencoder's kind."""
    return autoencoder_tiny if isinstance(spec, TinyAutoencoderConfig) else autoencoder
