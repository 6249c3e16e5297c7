"""Stable Diffusion's U-Net under the tensor names and config keys of diffusers' model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.pretrained.config_check import Fixed, Keys, check_config, each, read_keys, write_keys
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

_KEYS: Keys = {
    "in_channels": ("in_channels", 4),
    "out_channels": ("out_channels", 4),
    "block_out_channels": ("block_out_channels", (320, 640, 1280, 1280)),
    "norm_num_groups": ("norm_num_groups", 32),
    "projection_class_embeddings_input_dim": ("added_width", None),
}
_OTHER = {
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "transformer_layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "use_linear_projection",
    "upcast_attention",
    "addition_time_embed_dim",
}
FIXED: Fixed = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "addition_embed_type_num_heads": None,
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "sample_size": None,
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}

_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")


def read_unet_config(config: Mapping[str, Any]) -> UNet2DConditionConfig:
    """Read our config from diffusers' `UNet2DConditionModel` config; keys have its defaults.

    Raises:
      UserError: the config asks for something that this network does not have.
    """
    check_config(WHAT, config, {*_KEYS, *_OTHER}, FIXED)
    fields = read_keys(config, _KEYS)
    levels = len(fields["block_out_channels"])
    down = tuple(config.get("down_block_types", (_DOWN[1],) * (levels - 1) + (_DOWN[0],)))
    attends = [kind == _DOWN[1] for kind in down]
    up = tuple(config.get("up_block_types", [_UP[attend] for attend in reversed(attends)]))
    if set(down) - set(_DOWN) or up != tuple(_UP[attend] for attend in reversed(attends)):
        raise UserError(
            f"{WHAT}: down_block_types are {down} and up_block_types {up}: expected "
            f"{' and '.join(_DOWN)}, and {' and '.join(_UP)} in the opposite order; use another "
            "model."
        )

    def per_level(key: str, default: int) -> tuple[Any, ...]:
        return each(f"{WHAT}: {key}", config.get(key, default), levels)

    layers = per_level("transformer_layers_per_block", 1)
    cross, depths = (
        set(per_level("cross_attention_dim", 1280)),
        set(per_level("layers_per_block", 2)),
    )
    if len(cross) > 1 or len(depths) > 1:
        raise UserError(
            f"{WHAT}: cross_attention_dim is {sorted(cross)} and layers_per_block "
            f"{sorted(depths)}: expected one value of each for all levels; use another model."
        )
    return UNet2DConditionConfig(
        **fields,
        layers_per_block=depths.pop(),
        transformer_layers=tuple(
            n if attend else 0 for n, attend in zip(layers, attends, strict=True)
        ),
        middle_transformer_layers=layers[-1],
        heads=per_level("attention_head_dim", 8),
        cross_attention_dim=cross.pop(),
        use_linear_projection=bool(config.get("use_linear_projection")),
        upcast_attention=bool(config.get("upcast_attention")),
        time_id_width=config.get("addition_time_embed_dim") or 256,
    )


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
        **write_keys(config, _KEYS),
        "down_block_types": [_DOWN[attend] for attend in attends],
        "up_block_types": [_UP[attend] for attend in reversed(attends)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "layers_per_block": config.layers_per_block,
        "transformer_layers_per_block": layers,
        "attention_head_dim": list(config.heads),
        "cross_attention_dim": config.cross_attention_dim,
        "use_linear_projection": config.use_linear_projection,
        "upcast_attention": config.upcast_attention,
        "addition_embed_type": None if config.added_width is None else "text_time",
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
