"""FLUX transformers under the tensor names and config keys of diffusers' models.

FLUX.1 is a `FluxTransformer2DModel`, FLUX.2 a `Flux2Transformer2DModel`. They differ in the
structure of the network, and here in a schema and a table each.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.flux import FLUX1, FluxConfig
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.pretrained.config_check import (
    FLAG,
    MOST_LAYERS,
    Only,
    Schema,
    Used,
    integer,
    named_fields,
    number,
    optional,
    read_keys,
    several,
    write_keys,
)
from jaxdiff.pretrained.key_mapping import from_torch_names, to_torch_names

FLUX1_KIND, FLUX2_KIND = "FluxTransformer2DModel", "Flux2Transformer2DModel"
WHAT = "transformer/config.json"

FLUX2 = FluxConfig()

_WIDTH, _LAYERS = integer(1, 2**16), integer(1, MOST_LAYERS)

_BOTH: Schema = {
    "num_layers": Used(19, _LAYERS, "double_depth"),
    "num_single_layers": Used(38, _LAYERS, "single_depth"),
    "attention_head_dim": Used(128, _WIDTH, "head_width"),
    "num_attention_heads": Used(24, _WIDTH, "heads"),
    "joint_attention_dim": Used(4096, _WIDTH, "text_width"),
    "guidance_embeds": Used(False, FLAG, "guidance_embedding"),
    "axes_dims_rope": Used([16, 56, 56], several(integer(2, 2**12)), "rope_axes"),
    "in_channels": Used(64, _WIDTH),
    "out_channels": Used(None, optional(_WIDTH)),
    "patch_size": Only(1),
}

FLUX1_KEYS: Schema = {**_BOTH, "pooled_projection_dim": Used(768, _WIDTH, "pooled_width")}
"""Schema of the config of a `FluxTransformer2DModel`."""

_FLUX2_DEFAULTS = {
    "num_layers": 8,
    "num_single_layers": 48,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "guidance_embeds": True,
    "axes_dims_rope": [32, 32, 32, 32],
    "in_channels": 128,
}

FLUX2_KEYS: Schema = {
    **_BOTH,
    **{
        key: dataclasses.replace(_BOTH[key], default=value)  # type: ignore[type-var]
        for key, value in _FLUX2_DEFAULTS.items()
    },
    "timestep_guidance_channels": Used(256, integer(2, 2**16), "time_width"),
    "mlp_ratio": Used(3.0, number(0, 2**10), "mlp_ratio"),
    "rope_theta": Used(2000, number(0, 2**30), "rope_theta"),
    "eps": Used(1e-6, number(0, 1), "eps"),
}
"""Schema of the config of a `Flux2Transformer2DModel`."""


def _numbered(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.first": f"{theirs}.linear_1", f"{ours}.second": f"{theirs}.linear_2"}


def _stream(ours: str, *, added: bool) -> dict[str, str]:
    """Return the names of a double block's attention, of image tokens or of the added text's."""
    attention = "transformer_blocks.{layer}.attn"
    table = {f"{ours}.{x}": f"{attention}.{f'add_{x}_proj' if added else f'to_{x}'}" for x in "qkv"}
    norm = "norm_added" if added else "norm"
    return table | {
        **{f"{ours}.heads.{x}": f"{attention}.{norm}_{x}" for x in "qk"},
        f"{ours}.out": f"{attention}.{'to_add_out' if added else 'to_out.0'}",
    }


_BOTH_NAMES = {
    "patch": "x_embedder",
    "words": "context_embedder",
    "final_modulation": "norm_out.linear",
    "final": "proj_out",
    **_stream("double.image", added=False),
    **_stream("double.text", added=True),
    **{f"single.heads.{x}": f"single_transformer_blocks.{{layer}}.attn.norm_{x}" for x in "qk"},
}

_DOUBLE, _SINGLE = "transformer_blocks.{layer}", "single_transformer_blocks.{layer}"

FLUX1_NAMES = {
    **_BOTH_NAMES,
    **_numbered("time", "time_text_embed.timestep_embedder"),
    **_numbered("guidance", "time_text_embed.guidance_embedder"),
    **_numbered("pooled", "time_text_embed.text_embedder"),
    "double.image.modulation": f"{_DOUBLE}.norm1.linear",
    "double.text.modulation": f"{_DOUBLE}.norm1_context.linear",
    "double.image.mlp.inner": f"{_DOUBLE}.ff.net.0.proj",
    "double.image.mlp.outer": f"{_DOUBLE}.ff.net.2",
    "double.text.mlp.inner": f"{_DOUBLE}.ff_context.net.0.proj",
    "double.text.mlp.outer": f"{_DOUBLE}.ff_context.net.2",
    "single.modulation": f"{_SINGLE}.norm.linear",
    **{f"single.{x}": f"{_SINGLE}.attn.to_{x}" for x in "qkv"},
    "single.inner": f"{_SINGLE}.proj_mlp",
    "single.out": f"{_SINGLE}.proj_out",
}

FLUX2_NAMES = {
    **_BOTH_NAMES,
    **_numbered("time", "time_guidance_embed.timestep_embedder"),
    **_numbered("guidance", "time_guidance_embed.guidance_embedder"),
    "image_modulation": "double_stream_modulation_img.linear",
    "text_modulation": "double_stream_modulation_txt.linear",
    "single_modulation": "single_stream_modulation.linear",
    "double.image.mlp.inner": f"{_DOUBLE}.ff.linear_in",
    "double.image.mlp.outer": f"{_DOUBLE}.ff.linear_out",
    "double.text.mlp.inner": f"{_DOUBLE}.ff_context.linear_in",
    "double.text.mlp.outer": f"{_DOUBLE}.ff_context.linear_out",
    "single.inner": f"{_SINGLE}.attn.to_qkv_mlp_proj",
    "single.out": f"{_SINGLE}.attn.to_out",
}


def read_flux1_config(config: Any, what: str = WHAT) -> FluxConfig:
    """Read our config from that of a `FluxTransformer2DModel`; keys have its defaults.

    Args:
      config: the parsed JSON.
      what: the file, for messages.

    Raises:
      UserError: the config asks for something that this network does not have.
    """
    return _read(config, what, FLUX1_KEYS, FLUX1)


def read_flux2_config(config: Any, what: str = WHAT) -> FluxConfig:
    """Read our config from that of a `Flux2Transformer2DModel`, as `read_flux1_config` does."""
    return _read(config, what, FLUX2_KEYS, FLUX2)


def _read(config: Any, what: str, schema: Schema, like: FluxConfig) -> FluxConfig:
    values = read_keys(what, config, schema)
    channels, outputs = values["in_channels"], values["out_channels"]
    packed = like.patch_size**2
    if outputs not in (None, channels) or channels % packed:
        raise UserError(
            f"{what}: in_channels is {channels} and out_channels {outputs}: expected equal numbers"
            f"{f', a multiple of {packed}' if packed > 1 else ''}, as of models that read nothing "
            "but noisy latents; use another model."
        )
    axes, head, count = values["axes_dims_rope"], values["attention_head_dim"], len(like.rope_axes)
    if len(axes) != count or sum(axes) != head or any(width % 2 for width in axes):
        raise UserError(
            f"{what}: axes_dims_rope is {list(axes)} and attention_head_dim {head}: expected "
            f"{count} even numbers whose sum is the latter; use another model."
        )
    if "time_width" in (fields := named_fields(values, schema)) and fields["time_width"] % 2:
        raise UserError(
            f"{what}: timestep_guidance_channels is {fields['time_width']}: expected an even "
            "number; use another model."
        )
    return dataclasses.replace(like, **fields, channels=channels // packed)


def is_flux1(config: FluxConfig) -> bool:
    """Whether a network has the structure of FLUX.1 or of FLUX.2.

    Raises:
      UserError: it has neither.
    """
    for like, schema in ((FLUX1, FLUX1_KEYS), (FLUX2, FLUX2_KEYS)):
        sizes = {x.field for x in schema.values() if isinstance(x, Used) and x.field}
        sizes |= {"channels", "max_references", "remat"}
        same = dataclasses.replace(like, **{name: getattr(config, name) for name in sizes})
        if same == config and len(config.rope_axes) == len(like.rope_axes):
            return like is FLUX1
    raise UserError(
        "The denoiser is neither a FLUX.1 nor a FLUX.2: expected the structure of one of them "
        "(mlp, bias, shared_modulation, fused, text_positions, patch_size), as diffusers has no "
        "others; export it in another format."
    )


def write_flux_config(config: FluxConfig) -> dict[str, Any]:
    """Return diffusers' config, the inverse of reading; `UserError` if it has no such model."""
    first = is_flux1(config)
    written = write_keys(config, FLUX1_KEYS if first else FLUX2_KEYS)
    if not first and config.rope_theta.is_integer():
        written["rope_theta"] = int(config.rope_theta)
    return {
        "_class_name": FLUX1_KIND if first else FLUX2_KIND,
        **written,
        "patch_size": 1,
        "in_channels": config.patch_channels,
        "out_channels": None,
    }


def flux_names(config: FluxConfig) -> Mapping[str, str]:
    """Return the table of a network's names in diffusers; `UserError` if it has no such model."""
    return FLUX1_NAMES if is_flux1(config) else FLUX2_NAMES


def flux_from_torch(
    tensors: Mapping[str, np.ndarray], config: FluxConfig, **options: Any
) -> dict[str, Any]:
    """Return the parameters of `Flux(config)` from a diffusers checkpoint.

    `options` and errors are those of `key_mapping.from_torch_names`.
    """
    params = abstract_params(bind_build(config))
    return from_torch_names(tensors, flux_names(config), params, **options)


def flux_to_torch(params: Mapping[str, Any], config: FluxConfig) -> dict[str, np.ndarray]:
    """Return the tensors of a diffusers checkpoint from the network's parameters."""
    return to_torch_names(params, flux_names(config))
