"""Stable Diffusion's U-Net under the tensor names and config keys of diffusers' model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.pretrained.config_check import Fixed, check_config, each
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

_READ = {
    "in_channels",
    "out_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "transformer_layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "use_linear_projection",
    "upcast_attention",
    "norm_num_groups",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
}

# Keys of diffusers' config that this network supports with these values only.
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


def read_unet_config(
    config: Mapping[str, Any], what: str = "unet/config.json"
) -> UNet2DConditionConfig:
    """Read our config from diffusers' `UNet2DConditionModel` config; keys have its defaults.

    Raises:
      UserError: the config asks for something that this network does not have.
    """
    widths = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    levels = len(widths)
    check_config(what, config, _READ, FIXED)
    down = tuple(config.get("down_block_types", (_DOWN[1],) * (levels - 1) + (_DOWN[0],)))
    attends = [kind == _DOWN[1] for kind in down]
    up = tuple(config.get("up_block_types", [_UP[attend] for attend in reversed(attends)]))
    if set(down) - set(_DOWN) or up != tuple(_UP[attend] for attend in reversed(attends)):
        raise UserError(
            f"{what}: down_block_types are {down} and up_block_types {up}: expected "
            f"{' and '.join(_DOWN)}, and {' and '.join(_UP)} in the opposite order; use another "
            "model."
        )
    layers = each(
        f"{what}: transformer_layers_per_block",
        config.get("transformer_layers_per_block", 1),
        levels,
    )
    cross = set(
        each(f"{what}: cross_attention_dim", config.get("cross_attention_dim", 1280), levels)
    )
    per_level = set(each(f"{what}: layers_per_block", config.get("layers_per_block", 2), levels))
    if len(cross) > 1 or len(per_level) > 1:
        raise UserError(
            f"{what}: cross_attention_dim is {sorted(cross)} and layers_per_block "
            f"{sorted(per_level)}: expected one value of each for all levels; use another model."
        )
    return UNet2DConditionConfig(
        in_channels=config.get("in_channels", 4),
        out_channels=config.get("out_channels", 4),
        block_out_channels=widths,
        layers_per_block=per_level.pop(),
        transformer_layers=tuple(
            n if attend else 0 for n, attend in zip(layers, attends, strict=True)
        ),
        middle_transformer_layers=layers[-1],
        heads=each(f"{what}: attention_head_dim", config.get("attention_head_dim", 8), levels),
        cross_attention_dim=cross.pop(),
        use_linear_projection=bool(config.get("use_linear_projection")),
        upcast_attention=bool(config.get("upcast_attention")),
        norm_num_groups=config.get("norm_num_groups", 32),
        added_width=config.get("projection_class_embeddings_input_dim"),
        time_id_width=config.get("addition_time_embed_dim") or 256,
    )


def write_unet_config(config: UNet2DConditionConfig) -> dict[str, Any]:
    """Return diffusers' config, from which `read_unet_config` reads the same."""
    attends = [depth > 0 for depth in config.transformer_layers]
    # diffusers has an entry for each level, attention or not; the last is the middle's.
    layers = [depth or 1 for depth in config.transformer_layers]
    layers[-1] = config.middle_transformer_layers
    if attends[-1] and layers[-1] != config.transformer_layers[-1]:
        raise UserError(
            f"A U-Net of {config.transformer_layers[-1]} transformer blocks at the last level and "
            f"{layers[-1]} in the middle has no config in diffusers: expected equal numbers; make "
            "them equal."
        )
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": [_DOWN[attend] for attend in attends],
        "up_block_types": [_UP[attend] for attend in reversed(attends)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "layers_per_block": config.layers_per_block,
        "transformer_layers_per_block": layers,
        "attention_head_dim": list(config.heads),
        "cross_attention_dim": config.cross_attention_dim,
        "use_linear_projection": config.use_linear_projection,
        "upcast_attention": config.upcast_attention,
        "norm_num_groups": config.norm_num_groups,
        "addition_embed_type": None if config.added_width is None else "text_time",
        "addition_time_embed_dim": None if config.added_width is None else config.time_id_width,
        "projection_class_embeddings_input_dim": config.added_width,
    }


def unet_from_torch(
    tensors: Mapping[str, np.ndarray], config: UNet2DConditionConfig, **options: Any
) -> dict[str, Any]:
    """Return the parameters of `UNet2DConditionModel(config)` from a diffusers checkpoint.

    `options` and errors are those of `key_mapping.from_torch_names`.
    """
    abstract = abstract_params(bind_init(type(config).build, config))
    return from_torch_names(tensors, UNET_NAMES, abstract, **options)


def unet_to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the tensors of a diffusers checkpoint from the U-Net's parameters, a nested dict."""
    return to_torch_names(params, UNET_NAMES)
