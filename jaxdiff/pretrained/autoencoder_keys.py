"""The autoencoder's parameters under the tensor names of diffusers' AutoencoderKL."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.pretrained.config_check import Fixed, Keys, check_config, read_keys, write_keys
from jaxdiff.pretrained.key_mapping import from_torch_names, to_torch_names
from jaxdiff.pretrained.safetensors_io import Cut, Renamed, to_linear


def _half_names(half: str, level: str, resample: str) -> dict[str, str]:
    block, shortcut = f"{half}.{level}.{{}}.resnets.{{}}", "conv_shortcut"
    middle = f"{half}.mid_block"
    attention = f"{middle}.attentions.0"
    return {
        f"{half}.conv_in": f"{half}.conv_in",
        f"{half}.levels.*.blocks.*": block,
        f"{half}.levels.*.blocks.*.shortcut": f"{block}.{shortcut}",
        f"{half}.levels.*.resample": f"{half}.{level}.{{}}.{resample}.0.conv",
        f"{half}.middle.first": f"{middle}.resnets.0",
        f"{half}.middle.second": f"{middle}.resnets.1",
        f"{half}.middle.attention.norm": f"{attention}.group_norm",
        f"{half}.middle.attention.q": f"{attention}.to_q",
        f"{half}.middle.attention.k": f"{attention}.to_k",
        f"{half}.middle.attention.v": f"{attention}.to_v",
        f"{half}.middle.attention.out": f"{attention}.to_out.0",
        f"{half}.norm_out": f"{half}.conv_norm_out",
        f"{half}.conv_out": f"{half}.conv_out",
    }


AUTOENCODER_NAMES = {
    **_half_names("encoder", "down_blocks", "downsamplers"),
    **_half_names("decoder", "up_blocks", "upsamplers"),
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
}

_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
"""Names of the original layout and of diffusers before 0.18. Both may have 1x1 convolutions."""


def _current_name(name: str) -> str | Mapping[str, Cut]:
    start, attention, rest = name.partition(".attentions.0.")
    if not attention:
        return name
    module, _, kind = rest.rpartition(".")
    new = f"{start}{attention}{_ATTENTION.get(module, module)}.{kind}"
    return {new: to_linear} if kind == "weight" else new


_KEYS: Keys = {
    "latent_channels": ("latent_channels", 4),
    "block_out_channels": ("block_out_channels", (64,)),
    "layers_per_block": ("layers_per_block", 1),
    "norm_num_groups": ("norm_num_groups", 32),
    "mid_block_add_attention": ("mid_block_add_attention", True),
    "use_quant_conv": ("use_quant_conv", True),
    "use_post_quant_conv": ("use_post_quant_conv", True),
    "scaling_factor": ("scaling_factor", 0.18215),
    "sample_size": ("sample_size", 32),
}
_OTHER = {"in_channels", "out_channels", "down_block_types", "up_block_types", "shift_factor"}

_FIXED: Fixed = {
    "act_fn": ("silu",),
    "force_upcast": None,  # for float16; the caller chooses the type of the weights
    "latents_mean": (None,),
    "latents_std": (None,),
}


def read_autoencoder_config(
    config: Mapping[str, Any], what: str = "vae/config.json"
) -> AutoencoderConfig:
    """Read our config from diffusers' `AutoencoderKL` config, whose missing keys have defaults.

    Raises:
      UserError: the config asks for something that this autoencoder does not have.
    """
    check_config(what, config, {*_KEYS, *_OTHER}, _FIXED)
    kinds = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    channels = {config.get("in_channels", 3), config.get("out_channels", 3)}
    if kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"} or len(channels) > 1:
        raise UserError(
            f"{what} has blocks {', '.join(sorted(kinds))} and {sorted(channels)} channels: "
            "expected DownEncoderBlock2D and UpDecoderBlock2D, and as many channels out as in; use "
            "another autoencoder."
        )
    return AutoencoderConfig(
        image_channels=channels.pop(),
        shift_factor=config.get("shift_factor") or 0.0,
        **read_keys(config, _KEYS),
    )


def write_autoencoder_config(config: AutoencoderConfig) -> dict[str, Any]:
    """Return diffusers' config: the inverse of `read_autoencoder_config`.

    Raises:
      UserError: diffusers has no such autoencoder.
    """
    if config.patch_size > 1:
        raise UserError(
            f"diffusers has no autoencoder of patch_size {config.patch_size}: expected 1; export "
            "the model in another format."
        )
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "shift_factor": config.shift_factor or None,
        **write_keys(config, _KEYS),
    }


def autoencoder_from_torch(
    tensors: Mapping[str, np.ndarray], config: AutoencoderConfig, **options: Any
) -> dict[str, Any]:
    """Return the parameters of `Autoencoder(config)` from a diffusers checkpoint, old or new.

    `options` and errors are those of `key_mapping.from_torch_names`.
    """
    renamed = Renamed(tensors, _current_name)
    abstract = abstract_params(bind_build(config))
    return from_torch_names(renamed, AUTOENCODER_NAMES, abstract, **options)


def autoencoder_to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return a diffusers checkpoint's tensors from the autoencoder's parameters, a nested dict."""
    return to_torch_names(params, AUTOENCODER_NAMES)
