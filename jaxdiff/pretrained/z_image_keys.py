"""Z-Image's parameters under the tensor names of diffusers' ZImageTransformer2DModel."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.z_image import PATCH, ZImageConfig
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.pretrained.config_check import (
    MOST_LAYERS,
    Only,
    Schema,
    Unused,
    Used,
    integer,
    named_fields,
    number,
    read_keys,
    several,
    write_keys,
)
from jaxdiff.pretrained.key_mapping import from_torch_names, to_torch_names

KIND, WHAT = "ZImageTransformer2DModel", "transformer/config.json"

_BLOCK = {
    "modulation": "adaLN_modulation.0",
    "norm1": "attention_norm1",
    "norm2": "attention_norm2",
    "norm3": "ffn_norm1",
    "norm4": "ffn_norm2",
    "attention.q": "attention.to_q",
    "attention.k": "attention.to_k",
    "attention.v": "attention.to_v",
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    "mlp.gate": "feed_forward.w1",
    "mlp.down": "feed_forward.w2",
    "mlp.up": "feed_forward.w3",
}
_STACKS = {"image_refiner": "noise_refiner", "text_refiner": "context_refiner", "blocks": "layers"}

Z_IMAGE_NAMES = {
    "patch": f"all_x_embedder.{PATCH}-1",
    "image_pad": "x_pad_token",
    "text_norm": "cap_embedder.0",
    "text": "cap_embedder.1",
    "text_pad": "cap_pad_token",
    "time1": "t_embedder.mlp.0",
    "time2": "t_embedder.mlp.2",
    **{
        f"{ours}.{inner}": f"{theirs}.{{layer}}.{name}"
        for ours, theirs in _STACKS.items()
        for inner, name in _BLOCK.items()
    },
    "final_modulation": f"all_final_layer.{PATCH}-1.adaLN_modulation.1",
    "final": f"all_final_layer.{PATCH}-1.linear",
}

_COUNT, _LAYERS = integer(1, 2**16), integer(1, MOST_LAYERS)

Z_IMAGE_KEYS: Schema = {
    "all_patch_size": Only([PATCH], (PATCH,)),
    "all_f_patch_size": Only([1], (1,)),
    "in_channels": Used(16, _COUNT, "channels"),
    "dim": Used(3840, _COUNT),
    "n_layers": Used(30, _LAYERS, "depth"),
    "n_refiner_layers": Used(2, _LAYERS, "refiner_depth"),
    "n_heads": Used(30, _COUNT, "heads"),
    "n_kv_heads": Unused("diffusers' network has as many as n_heads"),
    "norm_eps": Used(1e-5, number(0, 1), "eps"),
    "qk_norm": Only(True),
    "cap_feat_dim": Used(2560, _COUNT, "text_width"),
    "siglip_feat_dim": Only(None),
    "rope_theta": Used(256.0, number(0, 1e9), "rope_theta"),
    "t_scale": Used(1000.0, number(0, 1e9), "time_scale"),
    "axes_dims": Used([32, 48, 48], several(_COUNT), "rope_axes"),
    "axes_lens": Used([1024, 512, 512], several(_COUNT), "rope_lengths"),
}
"""Schema of Z-Image's `config.json`."""


def read_z_image_config(config: Any, what: str = WHAT) -> ZImageConfig:
    """Read our config from diffusers', whose missing keys have defaults.

    Raises:
      UserError: the config asks for something that this network does not have.
    """
    values = read_keys(what, config, Z_IMAGE_KEYS)
    heads, axes, width = values["n_heads"], values["axes_dims"], values["dim"]
    if heads * sum(axes) != width or any(axis % 2 for axis in axes):
        raise UserError(
            f"{what}: dim is {width}, n_heads {heads} and axes_dims {list(axes)}: expected dim to "
            "be n_heads times the sum of axes_dims, which are even; use another model."
        )
    for key in ("axes_dims", "axes_lens"):
        if len(values[key]) != 3:
            raise UserError(
                f"{what}: {key} has {len(values[key])} numbers: expected 3, for the caption, rows "
                "and columns; use another model."
            )
    return ZImageConfig(**named_fields(values, Z_IMAGE_KEYS))


def write_z_image_config(config: ZImageConfig) -> dict[str, Any]:
    """Return diffusers' config: the inverse of `read_z_image_config`."""
    return {
        "_class_name": KIND,
        "all_patch_size": [PATCH],
        "all_f_patch_size": [1],
        "dim": config.width,
        "n_kv_heads": config.heads,
        "qk_norm": True,
        "siglip_feat_dim": None,
        **write_keys(config, Z_IMAGE_KEYS),
    }


def z_image_from_torch(
    tensors: Mapping[str, np.ndarray], config: ZImageConfig, **options: Any
) -> dict[str, Any]:
    """Return the parameters of `ZImage(config)` from tensors under diffusers' names.

    `options` and errors are those of `key_mapping.from_torch_names`.
    """
    abstract = abstract_params(bind_build(config))
    return from_torch_names(tensors, Z_IMAGE_NAMES, abstract, **options)


def z_image_to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return tensors under diffusers' names from the network's parameters, a nested dict."""
    return to_torch_names(params, Z_IMAGE_NAMES)
