"""Folders of diffusers' autoencoders: `config.json`, `diffusion_pytorch_model.safetensors`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.io.text import read_json
from jaxdiff.models.autoencoders.flux2 import Flux2AutoencoderConfig
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.text_to_image import AnyAutoencoder
from jaxdiff.pretrained import autoencoder_keys, tiny_autoencoder_keys
from jaxdiff.pretrained.placement import Place
from jaxdiff.pretrained.safetensors_io import open_weights, to_device

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"

PublishedAutoencoder = AutoencoderConfig | TinyAutoencoderConfig | Flux2AutoencoderConfig


def is_autoencoder_config(data: Any) -> bool:
    """Whether a `config.json` is that of an autoencoder of diffusers."""
    kinds = (autoencoder_keys.KIND, autoencoder_keys.FLUX2_KIND, tiny_autoencoder_keys.KIND)
    return isinstance(data, dict) and data.get("_class_name") in kinds


def read_autoencoder_spec(folder: epath.PathLike, kind: str | None = None) -> PublishedAutoencoder:
    """Read the specification of an autoencoder.

    Args:
      folder: with `config.json`.
      kind: diffusers' class; None takes the config's.

    Raises:
      UserError: the config is missing, or has unsupported values.
    """
    root = epath.Path(folder)
    config, what = read_json(root / CONFIG, "the whole folder of a model"), f"{root.name}/{CONFIG}"
    kind = kind or (config.get("_class_name") if isinstance(config, Mapping) else None)
    if kind == tiny_autoencoder_keys.KIND:
        return tiny_autoencoder_keys.read_tiny_autoencoder_config(config, what)
    if kind == autoencoder_keys.FLUX2_KIND:
        return autoencoder_keys.read_flux2_autoencoder_config(config, what)
    return autoencoder_keys.read_autoencoder_config(config, what)


def read_autoencoder_folder(
    folder: epath.PathLike,
    kind: str | None = None,
    *,
    place: Place = to_device,
) -> tuple[PublishedAutoencoder, dict[str, Any]]:
    """Read an autoencoder's specification and parameters.

    Args:
      folder: with `config.json` and `diffusion_pytorch_model.safetensors`.
      kind: diffusers' class; None takes the config's.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: a file is missing or damaged, or of an unsupported kind.
    """
    spec = read_autoencoder_spec(folder, kind)
    return spec, read_autoencoder_params(folder, spec, place=place)


def read_autoencoder_params(
    folder: epath.PathLike, spec: AnyAutoencoder, *, place: Place = to_device
) -> dict[str, Any]:
    """Read the parameters of an autoencoder whose specification is known."""
    tensors = open_weights(epath.Path(folder), WEIGHTS)
    if isinstance(spec, TinyAutoencoderConfig):
        return tiny_autoencoder_keys.tiny_autoencoder_from_torch(tensors, spec, place=place)
    assert isinstance(spec, AutoencoderConfig | Flux2AutoencoderConfig)  # all that are published
    return autoencoder_keys.autoencoder_from_torch(tensors, spec, place=place)


def published_autoencoder(
    spec: AnyAutoencoder | None, params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return diffusers' config and tensors of an autoencoder."""
    if isinstance(spec, TinyAutoencoderConfig):
        config = tiny_autoencoder_keys.write_tiny_autoencoder_config(spec)
        return config, tiny_autoencoder_keys.tiny_autoencoder_to_torch(params)
    assert isinstance(spec, AutoencoderConfig | Flux2AutoencoderConfig)  # all that are published
    config = autoencoder_keys.write_autoencoder_config(spec)
    return config, autoencoder_keys.autoencoder_to_torch(params)
