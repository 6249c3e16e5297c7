"""Folders of transformers' DINOv2: `config.json` and `model.safetensors`."""

import re
from typing import Any

from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.io.text import read_json
from jaxdiff.models.image_encoders.dinov2 import Dinov2Config
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.pretrained.clip_keys import BASE_KEYS
from jaxdiff.pretrained.config_check import (
    MOST_LAYERS,
    OFF,
    Only,
    Schema,
    Unused,
    Used,
    integer,
    named_fields,
    read_keys,
    side,
)
from jaxdiff.pretrained.key_mapping import from_torch_names
from jaxdiff.pretrained.safetensors_io import Renamed, open_weights

CONFIG = "config.json"

_LAYER = "encoder.layer.{layer}"
_NAMES = {
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "class_token": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    "blocks.attention_norm": f"{_LAYER}.norm1",
    "blocks.attention.q": f"{_LAYER}.attention.attention.query",
    "blocks.attention.k": f"{_LAYER}.attention.attention.key",
    "blocks.attention.v": f"{_LAYER}.attention.attention.value",
    "blocks.attention.out": f"{_LAYER}.attention.output.dense",
    "blocks.attention_scale": f"{_LAYER}.layer_scale1.lambda1",
    "blocks.mlp_norm": f"{_LAYER}.norm2",
    "blocks.mlp_in": f"{_LAYER}.mlp.fc1",
    "blocks.mlp_out": f"{_LAYER}.mlp.fc2",
    "blocks.mlp_scale": f"{_LAYER}.layer_scale2.lambda1",
    "final_norm": "layernorm",
}
_OF_VERSION_5 = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
_WIDTH = integer(1, 2**16)
KEYS: Schema = {
    **BASE_KEYS,
    "image_size": Used(224, side(1, 2**14), "image_size"),
    "patch_size": Used(14, side(1, 2**14), "patch_size"),
    "hidden_size": Used(768, _WIDTH, "width"),
    "num_hidden_layers": Used(12, integer(1, MOST_LAYERS), "depth"),
    "num_attention_heads": Used(12, _WIDTH, "heads"),
    "mlp_ratio": Used(4, integer(1, 64), "mlp_ratio"),
    "hidden_act": Only("gelu"),
    "layer_norm_eps": Only(1e-6),
    "num_channels": Only(3),
    "qkv_bias": Only(True),
    "use_swiglu_ffn": OFF,
    **dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
        Unused("for training"),
    ),
    **dict.fromkeys(("layerscale_value", "use_mask_token"), Unused("for training")),
    **dict.fromkeys(
        ("apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names"),
        Unused("for other outputs"),
    ),
}
"""Schema of DINOv2's `config.json`."""


def is_dinov2_config(data: Any) -> bool:
    """Whether a `config.json` is that of a DINOv2 of transformers."""
    return isinstance(data, dict) and data.get("model_type") == "dinov2"


def read_dinov2_folder(folder: epath.PathLike) -> tuple[Dinov2Config, dict[str, Any]]:
    """Read the specification and the parameters of a DINOv2.

    Raises:
      UserError: a file is missing or damaged, or has unsupported values.
    """
    root = epath.Path(folder)
    what = f"{root.name}/{CONFIG}"
    values = read_keys(what, read_json(root / CONFIG, "the whole folder of a model"), KEYS)
    if values["hidden_size"] % values["num_attention_heads"]:
        raise UserError(f"{what}: hidden_size is no multiple of num_attention_heads: use another.")
    config = Dinov2Config(**named_fields(values, KEYS))
    tensors = Renamed(open_weights(root, "model"), _old_name)
    return config, from_torch_names(tensors, _NAMES, abstract_params(bind_build(config)))


def _old_name(name: str) -> str | None:
    """Return the name that the hub's files have; None for what only training reads."""
    name = name.removeprefix("dinov2.")
    if name == "embeddings.mask_token":
        return None
    return re.sub("|".join(_OF_VERSION_5), lambda match: _OF_VERSION_5[match[0]], name)
