"""The tiny autoencoder's parameters under the tensor names of diffusers' AutoencoderTiny."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.pretrained.config_check import Fixed, check_config
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

_READ = {
    "in_channels",
    "out_channels",
    "latent_channels",
    "encoder_block_out_channels",
    "decoder_block_out_channels",
    "num_encoder_blocks",
    "num_decoder_blocks",
}

_FIXED: Fixed = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "scaling_factor": (1.0,),
    "shift_factor": (0.0,),
    "block_out_channels": None,  # diffusers writes the encoder's a second time
    "latent_magnitude": None,  # of latents kept as images of 8 bits
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
    check_config(what, config, _READ, _FIXED)
    four = (64,) * 4
    widths = {
        *config.get("encoder_block_out_channels", four),
        *config.get("decoder_block_out_channels", four),
    }
    channels = {config.get("in_channels", 3), config.get("out_channels", 3)}
    if len(widths) > 1 or len(channels) > 1:
        raise UserError(
            f"{what} has layers of widths {sorted(widths)} and images of {sorted(channels)} "
            "channels: expected one width, and as many channels out as in; use another one."
        )
    return TinyAutoencoderConfig(
        image_channels=channels.pop(),
        latent_channels=config.get("latent_channels", 4),
        width=widths.pop(),
        encoder_blocks=tuple(config.get("num_encoder_blocks", (1, 3, 3, 3))),
        decoder_blocks=tuple(config.get("num_decoder_blocks", (3, 3, 3, 1))),
    )


def write_tiny_autoencoder_config(config: TinyAutoencoderConfig) -> dict[str, Any]:
    """Return diffusers' config, from which `read_tiny_autoencoder_config` reads the same."""
    widths = [config.width] * len(config.encoder_blocks)
    return {
        "_class_name": KIND,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "num_encoder_blocks": list(config.encoder_blocks),
        "num_decoder_blocks": list(config.decoder_blocks),
    }


def tiny_autoencoder_from_torch(
    tensors: Mapping[str, np.ndarray], config: TinyAutoencoderConfig, **options: Any
) -> dict[str, Any]:
    """Return the parameters of `TinyAutoencoder(config)` from a diffusers checkpoint.

    `options` and errors are those of `key_mapping.from_torch_names`.
    """
    abstract = abstract_params(bind_init(type(config).build, config))
    return from_torch_names(tensors, TINY_NAMES, abstract, **options)


def tiny_autoencoder_to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return a diffusers checkpoint's tensors from the autoencoder's parameters, a nested dict."""
    return to_torch_names(params, TINY_NAMES)
