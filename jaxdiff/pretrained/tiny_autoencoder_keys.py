"""The tiny autoencoder's parameters under the tensor names of diffusers' AutoencoderTiny."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.pretrained.autoencoder_keys import check_channels
from jaxdiff.pretrained.config_check import (
    Only,
    Schema,
    Unused,
    Used,
    integer,
    named_fields,
    read_keys,
    several,
    write_keys,
)
from jaxdiff.pretrained.key_mapping import from_torch_names, to_torch_names

TINY_NAMES = {
    f"{half}.layers.*{ours}": f"{half}.layers.{{}}{theirs}"
    for half in ("encoder", "decoder")
    for ours, theirs in (
        ("", ""),
        (".conv1", ".conv.0"),
        (".conv2", ".conv.2"),
        (".conv3", ".conv.4"),
    )
}

KIND = "AutoencoderTiny"

_WIDTH = integer(1, 2**16)
_WIDTHS = ("encoder_block_out_channels", "decoder_block_out_channels")
_BLOCKS = ("num_encoder_blocks", "num_decoder_blocks")
_STORED = Unused("for latents stored as 8-bit images")

TINY_KEYS: Schema = {
    "in_channels": Used(3, _WIDTH, "image_channels"),
    "out_channels": Used(3, _WIDTH),
    "latent_channels": Used(4, _WIDTH, "latent_channels"),
    **{key: Used([64] * 4, several(_WIDTH)) for key in _WIDTHS},
    "num_encoder_blocks": Used([1, 3, 3, 3], several(integer(1, 64)), "encoder_blocks"),
    "num_decoder_blocks": Used([3, 3, 3, 1], several(integer(1, 64)), "decoder_blocks"),
    "act_fn": Only("relu"),
    "upsample_fn": Only("nearest"),
    "upsampling_scaling_factor": Only(2),
    "scaling_factor": Only(1.0),
    "shift_factor": Only(0.0, None),
    "block_out_channels": Unused("diffusers writes the encoder's widths a second time"),
    "latent_magnitude": _STORED,
    "latent_shift": _STORED,
    "force_upcast": Unused("for float16; the caller chooses the type of the weights"),
}
"""Schema of the tiny autoencoder's `config.json`."""


def read_tiny_autoencoder_config(
    config: Any, what: str = "vae/config.json"
) -> TinyAutoencoderConfig:
    """Read our config from diffusers' `AutoencoderTiny` config, whose missing keys have defaults.

    Raises:
      UserError: the config asks for something that this autoencoder does not have.
    """
    values = read_keys(what, config, TINY_KEYS)
    check_channels(what, values)
    width = values[_WIDTHS[0]][0]
    for key, blocks in zip(_WIDTHS, _BLOCKS, strict=True):
        if set(values[key]) != {width} or len(values[key]) != len(values[blocks]):
            raise UserError(
                f"{what}: {key} is {list(values[key])}: expected {width} for each of the "
                f"{len(values[blocks])} {blocks}; use another autoencoder."
            )
    return TinyAutoencoderConfig(width=width, **named_fields(values, TINY_KEYS))


def write_tiny_autoencoder_config(config: TinyAutoencoderConfig) -> dict[str, Any]:
    """Return diffusers' config: the inverse of `read_tiny_autoencoder_config`."""
    return {
        "_class_name": KIND,
        "out_channels": config.image_channels,
        **dict.fromkeys(_WIDTHS, [config.width] * len(config.encoder_blocks)),
        **write_keys(config, TINY_KEYS),
    }


def tiny_autoencoder_from_torch(
    tensors: Mapping[str, np.ndarray], config: TinyAutoencoderConfig, **options: Any
) -> dict[str, Any]:
    """Return the parameters of `TinyAutoencoder(config)` from a diffusers checkpoint.

    `options` and errors are those of `key_mapping.from_torch_names`.
    """
    return from_torch_names(tensors, TINY_NAMES, abstract_params(bind_build(config)), **options)


def tiny_autoencoder_to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return a diffusers checkpoint's tensors from the autoencoder's parameters, a nested dict."""
    return to_torch_names(params, TINY_NAMES)
