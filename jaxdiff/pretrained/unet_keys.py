"""Stable Diffusion's U-Net under the tensor names and config keys of diffusers' model."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.pretrained.config_check import (
    FLAG,
    OFF,
    Only,
    Schema,
    Unused,
    Used,
    choice,
    each,
    integer,
    named_fields,
    one_or_several,
    optional,
    read_keys,
    several,
    side,
    write_keys,
)
from jaxdiff.pretrained.key_mapping import from_torch_names, to_torch_names


def _block_names(ours: str, theirs: str) -> dict[str, str]:
    return {ours: theirs, f"{ours}.time": f"{theirs}.time_emb_proj"} | {
        f"{ours}.shortcut": f"{theirs}.conv_shortcut"
    }


def _transformer_names(ours: str, theirs: str) -> dict[str, str]:
    block = f"{theirs}.transformer_blocks.{{layer}}"
    table = {ours: theirs, f"{ours}.blocks": block}
    for attention, number in (("attention", 1), ("cross", 2)):
        for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
            table[f"{ours}.blocks.{attention}.{part}"] = f"{block}.attn{number}.{name}"
    table[f"{ours}.blocks.mlp.inner"] = f"{block}.ff.net.0.proj"
    table[f"{ours}.blocks.mlp.outer"] = f"{block}.ff.net.2"
    return table


UNET_NAMES = {
    "conv_in": "conv_in",
    "time1": "time_embedding.linear_1",
    "time2": "time_embedding.linear_2",
    "added1": "add_embedding.linear_1",
    "added2": "add_embedding.linear_2",
    **_block_names("down.*.blocks.*", "down_blocks.{}.resnets.{}"),
    **_transformer_names("down.*.transformers.*", "down_blocks.{}.attentions.{}"),
    "down.*.resample": "down_blocks.{}.downsamplers.0.conv",
    **_block_names("middle.first", "mid_block.resnets.0"),
    **_transformer_names("middle.transformer", "mid_block.attentions.0"),
    **_block_names("middle.second", "mid_block.resnets.1"),
    **_block_names("up.*.blocks.*", "up_blocks.{}.resnets.{}"),
    **_transformer_names("up.*.transformers.*", "up_blocks.{}.attentions.{}"),
    "up.*.resample": "up_blocks.{}.upsamplers.0.conv",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}

WHAT = "unet/config.json"

_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")

_WIDTH, _LAYERS = integer(1, 2**16), integer(1, 64)

UNET_KEYS: Schema = {
    "in_channels": Used(4, _WIDTH, "in_channels"),
    "out_channels": Used(4, _WIDTH, "out_channels"),
    "block_out_channels": Used([320, 640, 1280, 1280], several(_WIDTH), "block_out_channels"),
    "norm_num_groups": Used(32, _WIDTH, "norm_num_groups"),
    "use_linear_projection": Used(False, FLAG, "use_linear_projection"),
    "upcast_attention": Used(False, FLAG, "upcast_attention"),
    "down_block_types": Used([*[_DOWN[1]] * 3, _DOWN[0]], several(choice(_DOWN))),
    "up_block_types": Used([_UP[0], *[_UP[1]] * 3], several(choice(_UP))),
    "layers_per_block": Used(2, one_or_several(_LAYERS)),
    "transformer_layers_per_block": Used(1, one_or_several(_LAYERS)),
    "attention_head_dim": Used(8, one_or_several(_WIDTH)),
    "cross_attention_dim": Used(1280, one_or_several(_WIDTH)),
    "addition_embed_type": Used(None, optional(choice(("text_time",)))),
    "addition_time_embed_dim": Used(None, optional(_WIDTH)),
    "projection_class_embeddings_input_dim": Used(None, optional(_WIDTH)),
    "sample_size": Used(None, optional(side(1, 2**14))),
    "act_fn": Only("silu", "swish"),
    "addition_embed_type_num_heads": Unused("of other values of addition_embed_type"),
    "attention_type": Only("default"),
    "center_input_sample": OFF,
    "class_embed_type": Only(None),
    "class_embeddings_concat": OFF,
    "conv_in_kernel": Only(3),
    "conv_out_kernel": Only(3),
    "cross_attention_norm": Only(None),
    "downsample_padding": Only(1),
    "dropout": Only(0.0),
    "dual_cross_attention": OFF,
    "encoder_hid_dim": Only(None),
    "encoder_hid_dim_type": Only(None),
    "flip_sin_to_cos": Only(True),
    "freq_shift": Only(0),
    "mid_block_only_cross_attention": OFF,
    "mid_block_scale_factor": Only(1),
    "mid_block_type": Only("UNetMidBlock2DCrossAttn"),
    "norm_eps": Only(1e-5),
    "num_attention_heads": Only(None),
    "num_class_embeds": Only(None),
    "only_cross_attention": Used(False, one_or_several(FLAG)),
    "resnet_out_scale_factor": Only(1.0),
    "resnet_skip_time_act": OFF,
    "resnet_time_scale_shift": Only("default"),
    "reverse_transformer_layers_per_block": Only(None),
    "time_cond_proj_dim": Only(None),
    "time_embedding_act_fn": Only(None),
    "time_embedding_dim": Only(None),
    "time_embedding_type": Only("positional"),
    "timestep_post_act": Only(None),
}
"""Schema of `unet/config.json`."""


def read_unet_config(config: Any) -> UNet2DConditionConfig:
    """Read our config from diffusers' `UNet2DConditionModel` config; keys have its defaults.

    Raises:
      UserError: the config asks for something that this network does not have.
    """
    values = read_keys(WHAT, config, UNET_KEYS)
    levels = len(values["block_out_channels"])

    def per_level(key: str) -> tuple[Any, ...]:
        return each(f"{WHAT}: {key}", values[key], levels)

    attends = [kind == _DOWN[1] for kind in per_level("down_block_types")]
    up = [_UP[attend] for attend in reversed(attends)]
    if list(per_level("up_block_types")) != up:
        raise UserError(
            f"{WHAT}: up_block_types are {list(values['up_block_types'])}: expected {up}, the "
            "opposite of down_block_types; use another model."
        )
    if any(per_level("only_cross_attention")):
        raise UserError(
            f"{WHAT}: only_cross_attention is true, which jaxdiff does not support: expected "
            "false; use another model."
        )
    for key in ("cross_attention_dim", "layers_per_block"):
        if len(set(per_level(key))) > 1:
            raise UserError(
                f"{WHAT}: {key} is {list(values[key])}: expected one value for all levels; use "
                "another model."
            )
    added = (values["addition_time_embed_dim"], values["projection_class_embeddings_input_dim"])
    is_xl = values["addition_embed_type"] is not None
    if is_xl and None in added:
        raise UserError(
            f"{WHAT}: addition_embed_type is text_time, addition_time_embed_dim {added[0]} and "
            f"projection_class_embeddings_input_dim {added[1]}: expected numbers; use another "
            "model."
        )
    layers = per_level("transformer_layers_per_block")
    return UNet2DConditionConfig(
        **named_fields(values, UNET_KEYS),
        layers_per_block=per_level("layers_per_block")[0],
        transformer_layers=tuple(
            n if attend else 0 for n, attend in zip(layers, attends, strict=True)
        ),
        middle_transformer_layers=layers[-1],
        heads=per_level("attention_head_dim"),
        cross_attention_dim=per_level("cross_attention_dim")[0],
        **({"time_id_width": added[0], "added_width": added[1]} if is_xl else {}),
    )


def default_size(config: Mapping[str, Any]) -> int:
    """Return the side of the latents that a checked config states, or else Stable Diffusion's.

    diffusers takes a side below 64 in files of its first versions for a mistake.
    """
    side_of = read_keys(WHAT, config, UNET_KEYS)["sample_size"] or 64
    version = re.match(r"0\.(\d{1,9})\.", str(config.get("_diffusers_version")))
    return max(side_of, 64) if version and int(version[1]) < 9 else side_of


def write_unet_config(config: UNet2DConditionConfig) -> dict[str, Any]:
    """Return diffusers' config: the inverse of `read_unet_config`."""
    attends = [depth > 0 for depth in config.transformer_layers]
    # diffusers has an entry for each level, attention or not; the last is the middle's.
    layers = [depth or 1 for depth in config.transformer_layers]
    layers[-1] = config.middle_transformer_layers
    if attends[-1] and layers[-1] != config.transformer_layers[-1]:
        raise UserError(
            f"The U-Net has {config.transformer_layers[-1]} transformer blocks at the last level "
            f"and {layers[-1]} in the middle: expected equal numbers, as in diffusers; change "
            "transformer_layers or middle_transformer_layers."
        )
    return {
        "_class_name": "UNet2DConditionModel",
        **write_keys(config, UNET_KEYS),
        "down_block_types": [_DOWN[attend] for attend in attends],
        "up_block_types": [_UP[attend] for attend in reversed(attends)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "layers_per_block": config.layers_per_block,
        "transformer_layers_per_block": layers,
        "attention_head_dim": list(config.heads),
        "cross_attention_dim": config.cross_attention_dim,
        "addition_embed_type": None if config.added_width is None else "text_time",
        "projection_class_embeddings_input_dim": config.added_width,
        "addition_time_embed_dim": None if config.added_width is None else config.time_id_width,
    }


def unet_from_torch(
    tensors: Mapping[str, np.ndarray], config: UNet2DConditionConfig, **options: Any
) -> dict[str, Any]:
    """Return the parameters of `UNet2DConditionModel(config)` from a diffusers checkpoint.

    `options` and errors are those of `key_mapping.from_torch_names`.
    """
    return from_torch_names(tensors, UNET_NAMES, abstract_params(bind_build(config)), **options)


def unet_to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the tensors of a diffusers checkpoint from the U-Net's parameters, a nested dict."""
    return to_torch_names(params, UNET_NAMES)
