"""The autoencoder of FLUX.1 and Z-Image, or of FLUX.2, in one file, such as `ae.safetensors`.

In the layout of the original code, or under diffusers' names; also where the file holds other
components, after `first_stage_model.` or `vae.`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.flux2 import Flux2AutoencoderConfig
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.pretrained.autoencoder_keys import autoencoder_from_torch, autoencoder_to_torch
from jaxdiff.pretrained.placement import Place
from jaxdiff.pretrained.presets import FLUX1_AUTOENCODER
from jaxdiff.pretrained.safetensors_io import Renamed, Shape, TensorFiles, to_device, write_tensors
from jaxdiff.pretrained.single_file_keys import vae_original, vae_rename

FluxAutoencoderConfig = AutoencoderConfig | Flux2AutoencoderConfig

_PREFIXES = ("first_stage_model.", "vae.", "")
_MARK = "decoder.conv_in.weight"
_MULTIPLES = (1, 2, 4, 4)  # of the decoder's widths


def read_autoencoder_file_spec(file: epath.PathLike) -> FluxAutoencoderConfig:
    """Read the specification of an autoencoder from the shapes of its tensors.

    Raises:
      UserError: the file is damaged, or holds no autoencoder of FLUX.
    """
    return _spec(file, _open(file).shapes)


def is_autoencoder_file(file: epath.PathLike) -> bool:
    """Whether a safetensors file holds an autoencoder alone.

    Raises:
      UserError: the file is missing or damaged.
    """
    names = TensorFiles([epath.Path(file)]).shapes
    return _MARK in names


def read_autoencoder_file(
    file: epath.PathLike,
    config: FluxAutoencoderConfig | None = None,
    *,
    place: Place = to_device,
) -> tuple[FluxAutoencoderConfig, dict[str, Any]]:
    """Read an autoencoder, with tensors in their stored type.

    Args:
      file: safetensors.
      config: of the autoencoder; None takes that of FLUX.1 or FLUX.2, by the shapes.
      place: called with each parameter in our layout, such as to move it to a device.

    Raises:
      UserError: the file is damaged, or holds another autoencoder.
    """
    tensors = _open(file)
    config = config or _spec(file, tensors.shapes)
    options = {"what": str(file), "advice": "use the autoencoder of FLUX.1, Z-Image or FLUX.2"}
    renamed = Renamed(tensors, vae_rename(config))
    return config, autoencoder_from_torch(renamed, config, place=place, **options)


def write_autoencoder_file(
    file: epath.PathLike, params: Mapping[str, Any], config: FluxAutoencoderConfig
) -> None:
    """Write an autoencoder in the original layout, which ComfyUI reads.

    Args:
      file: safetensors.
      params: of the autoencoder, a nested dict; tensors keep their type.
      config: of the autoencoder.
    """
    write_tensors(file, vae_original(autoencoder_to_torch(params), config))


def _open(file: epath.PathLike) -> Renamed:
    tensors = TensorFiles([epath.Path(file)])
    prefix = next((prefix for prefix in _PREFIXES if prefix + _MARK in tensors), None)
    if prefix is None:
        raise UserError(
            f"{file} holds no autoencoder: expected {_MARK}, also after {_PREFIXES[0]}; use "
            "another file."
        )
    return Renamed(tensors, lambda n: n.removeprefix(prefix) if n.startswith(prefix) else None)


def _spec(file: object, shapes: Mapping[str, Shape]) -> FluxAutoencoderConfig:
    channels = (*shapes[_MARK], 0, 0)[1]
    if "bn.running_mean" not in shapes:
        if channels != FLUX1_AUTOENCODER.latent_channels:
            raise UserError(
                f"{file} holds an autoencoder of {channels} latent channels: expected the "
                f"{FLUX1_AUTOENCODER.latent_channels} of FLUX.1 and Z-Image, or FLUX.2's with its "
                "statistics; use a folder of diffusers, which states how latents are scaled."
            )
        return FLUX1_AUTOENCODER
    config = Flux2AutoencoderConfig(z_channels=max(channels, 1))
    width = (*shapes.get("decoder.conv_out.weight", ()), 0, 0)[1]
    if width in (0, config.block_out_channels[0]):
        return config
    widths = tuple(width * multiple for multiple in _MULTIPLES)
    return dataclasses.replace(config, decoder_block_out_channels=widths)
