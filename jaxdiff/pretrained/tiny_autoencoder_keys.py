"""The tiny autoencoder's parameters under the tensor names of diffusers' AutoencoderTiny."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.pretrained.config_check import Fixed, Keys, check_config, read_keys, write_keys
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

_KEYS: Keys = {
    "latent_channels": ("latent_channels", 4),
    "num_encoder_blocks": ("encoder_blocks", (1, 3, 3, 3)),
    "num_decoder_blocks": ("decoder_blocks", (3, 3, 3, 1)),
}
_WIDTHS = ("encoder_block_out_channels", "decoder_block_out_channels")
_CHANNELS = ("in_channels", "out_channels")

_FIXED: Fixed = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "scaling_factor": (1.0,),
    "shift_factor": (0.0,),
    "block_out_channels": None,  # diffusers writes the encoder's a second time
    "latent_magnitude": None,  # for latents stored as 8-bit images
    "latent_shift": None,
    "force_upcast": None,
}


def read_tiny_autoencoder_config(
    config: Mapping[str, Any], what: str = "vae/config.json"
) -> TinyAutoencoderConfig:
    """Read our config from diffusers' `AutoencoderTiny` config, whose missing keys have defaults.

    Raises:
      UserError: the config asks for something that this autoencoder does not have.
    """
    check_config(what, config, {*_KEYS, *_WIDTHS, *_CHANNELS}, _FIXED)
    widths = {width for key in _WIDTHS for width in config.get(key, (64,) * 4)}
    channels = {config.get(key, 3) for key in _CHANNELS}
    if len(widths) > 1 or len(channels) > 1:
        raise UserError(
            f"{what} has layers of widths {sorted(widths)} and images of {sorted(channels)} "
            "channels: expected one width, and as many channels out as in; use another one."
        )
    return TinyAutoencoderConfig(
        image_channels=channels.pop(), width=widths.pop(), **read_keys(config, _KEYS)
    )


def write_tiny_autoencoder_config(config: TinyAutoencoderConfig) -> dict[str, Any]:
    """Return diffusers' config: the inverse of `read_tiny_autoencoder_config`."""
    return {
        "_class_name": KIND,
        **dict.fromkeys(_CHANNELS, config.image_channels),
        **dict.fromkeys(_WIDTHS, [config.width] * len(config.encoder_blocks)),
        **write_keys(config, _KEYS),
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
