"""KL autoencoders' parameters under the tensor names of diffusers' AutoencoderKL, KLFlux2 too."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.flux2 import PACK, Flux2AutoencoderConfig
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.pretrained.config_check import (
    FLAG,
    Only,
    Schema,
    Unused,
    Used,
    choice,
    each,
    integer,
    named_fields,
    number,
    optional,
    read_keys,
    several,
    side,
    write_keys,
)
from jaxdiff.pretrained.key_mapping import from_torch_names, to_torch_names
from jaxdiff.pretrained.safetensors_io import Cut, Renamed, to_linear

KIND, FLUX2_KIND = "AutoencoderKL", "AutoencoderKLFlux2"


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
    "bn": "bn",
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


_WIDTH = integer(1, 2**16)
_BLOCKS = ("DownEncoderBlock2D", "UpDecoderBlock2D")

_COMMON_KEYS: Schema = {
    "in_channels": Used(3, _WIDTH, "image_channels"),
    "out_channels": Used(3, _WIDTH),
    "layers_per_block": Used(1, integer(1, 64), "layers_per_block"),
    "norm_num_groups": Used(32, _WIDTH, "norm_num_groups"),
    "mid_block_add_attention": Used(True, FLAG, "mid_block_add_attention"),
    "use_quant_conv": Used(True, FLAG, "use_quant_conv"),
    "use_post_quant_conv": Used(True, FLAG, "use_post_quant_conv"),
    "down_block_types": Used([_BLOCKS[0]], several(choice(_BLOCKS[:1]))),
    "up_block_types": Used([_BLOCKS[1]], several(choice(_BLOCKS[1:]))),
    "act_fn": Only("silu", "swish"),
}

AUTOENCODER_KEYS: Schema = {
    **_COMMON_KEYS,
    "latent_channels": Used(4, _WIDTH, "latent_channels"),
    "block_out_channels": Used([64], several(_WIDTH), "block_out_channels"),
    "scaling_factor": Used(0.18215, number(0, 1e6), "scaling_factor"),
    "shift_factor": Used(None, optional(number(-1e6, 1e6))),
    "sample_size": Used(32, side(1, 2**16, square=False), "sample_size"),
    "force_upcast": Unused("for float16; the caller chooses the type of the weights"),
    "latents_mean": Only(None),
    "latents_std": Only(None),
}
"""Schema of an autoencoder's `config.json`."""

FLUX2_KEYS: Schema = {
    **_COMMON_KEYS,
    "layers_per_block": Used(2, integer(1, 64), "layers_per_block"),
    "down_block_types": Used([_BLOCKS[0]] * 4, several(choice(_BLOCKS[:1]))),
    "up_block_types": Used([_BLOCKS[1]] * 4, several(choice(_BLOCKS[1:]))),
    "latent_channels": Used(32, _WIDTH, "z_channels"),
    "block_out_channels": Used([128, 256, 512, 512], several(_WIDTH), "block_out_channels"),
    "decoder_block_out_channels": Used(
        None, optional(several(_WIDTH)), "decoder_block_out_channels"
    ),
    "sample_size": Used(1024, side(1, 2**16, square=False), "sample_size"),
    "batch_norm_eps": Used(1e-4, number(0, 1), "batch_norm_eps"),
    "batch_norm_momentum": Unused("of training"),
    "patch_size": Only([PACK, PACK], (PACK, PACK)),
}
"""Schema of the `config.json` of FLUX.2's autoencoder."""


def read_autoencoder_config(config: Any, what: str = "vae/config.json") -> AutoencoderConfig:
    """Read our config from diffusers' `AutoencoderKL` config, whose missing keys have defaults.

    Raises:
      UserError: the config asks for something that this autoencoder does not have.
    """
    values = _checked_keys(config, what, AUTOENCODER_KEYS)
    return AutoencoderConfig(
        shift_factor=values["shift_factor"] or 0.0, **named_fields(values, AUTOENCODER_KEYS)
    )


def read_flux2_autoencoder_config(
    config: Any, what: str = "vae/config.json"
) -> Flux2AutoencoderConfig:
    """Read our config from diffusers' `AutoencoderKLFlux2` config, as `read_autoencoder_config`.

    Raises:
      UserError: the config asks for something that this autoencoder does not have.
    """
    values = _checked_keys(config, what, FLUX2_KEYS)
    return Flux2AutoencoderConfig(**named_fields(values, FLUX2_KEYS))


def _checked_keys(config: Any, what: str, schema: Schema) -> dict[str, Any]:
    values = read_keys(what, config, schema)
    for key in ("down_block_types", "up_block_types"):
        each(f"{what}: {key}", values[key], len(values["block_out_channels"]))
    check_channels(what, values)
    return values


def check_channels(what: str, values: Mapping[str, Any]) -> None:
    """Raise `UserError` for an autoencoder with more or fewer channels out than in."""
    if values["in_channels"] != values["out_channels"]:
        raise UserError(
            f"{what}: in_channels is {values['in_channels']} and out_channels "
            f"{values['out_channels']}: expected equal numbers; use another autoencoder."
        )


def write_autoencoder_config(
    config: AutoencoderConfig | Flux2AutoencoderConfig,
) -> dict[str, Any]:
    """Return diffusers' config: the inverse of the functions that read it.

    Raises:
      UserError: diffusers has no such autoencoder.
    """
    levels = len(config.block_out_channels)
    common = {
        "out_channels": config.image_channels,
        "down_block_types": [_BLOCKS[0]] * levels,
        "up_block_types": [_BLOCKS[1]] * levels,
    }
    if isinstance(config, Flux2AutoencoderConfig):
        return {"_class_name": FLUX2_KIND, **common, **write_keys(config, FLUX2_KEYS)}
    if config.patch_size > 1:
        raise UserError(
            f"diffusers has no autoencoder of patch_size {config.patch_size}: expected 1; export "
            "the model in another format."
        )
    return {
        "_class_name": KIND,
        **common,
        "shift_factor": config.shift_factor or None,
        **write_keys(config, AUTOENCODER_KEYS),
    }


def autoencoder_from_torch(
    tensors: Mapping[str, np.ndarray],
    config: AutoencoderConfig | Flux2AutoencoderConfig,
    **options: Any,
) -> dict[str, Any]:
    """Return the parameters of an autoencoder from a diffusers checkpoint, old or new.

    `options` and errors are those of `key_mapping.from_torch_names`.
    """
    renamed = Renamed(tensors, _current_name)
    abstract = abstract_params(bind_build(config))
    return from_torch_names(renamed, AUTOENCODER_NAMES, abstract, **options)


def autoencoder_to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return a diffusers checkpoint's tensors from the autoencoder's parameters, a nested dict."""
    return to_torch_names(params, AUTOENCODER_NAMES)
