"""CLIP's parameters under the tensor names of transformers' CLIPModel and its two towers."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from jaxdiff.models.clip import (
    Clip,
    ClipConfig,
    ClipText,
    ClipTextConfig,
    ClipVision,
    ClipVisionConfig,
)
from jaxdiff.models.layers import abstract_params
from jaxdiff.pretrained import names

AnyClipConfig = ClipTextConfig | ClipVisionConfig | ClipConfig


def _block_names(tower: str) -> dict[str, str]:
    layer = f"{tower}.encoder.layers.{{layer}}"
    return {
        "blocks.attention_norm": f"{layer}.layer_norm1",
        "blocks.attention.q": f"{layer}.self_attn.q_proj",
        "blocks.attention.k": f"{layer}.self_attn.k_proj",
        "blocks.attention.v": f"{layer}.self_attn.v_proj",
        "blocks.attention.out": f"{layer}.self_attn.out_proj",
        "blocks.mlp_norm": f"{layer}.layer_norm2",
        "blocks.mlp_in": f"{layer}.mlp.fc1",
        "blocks.mlp_out": f"{layer}.mlp.fc2",
    }


TEXT_NAMES = {
    "token_embedding": "text_model.embeddings.token_embedding.weight",
    "position_embedding": "text_model.embeddings.position_embedding.weight",
    **_block_names("text_model"),
    "final_norm": "text_model.final_layer_norm",
    "projection": "text_projection",
}

VISION_NAMES = {
    "patch_embedding": "vision_model.embeddings.patch_embedding",
    "class_embedding": "vision_model.embeddings.class_embedding",
    "position_embedding": "vision_model.embeddings.position_embedding.weight",
    "first_norm": "vision_model.pre_layrnorm",
    **_block_names("vision_model"),
    "final_norm": "vision_model.post_layernorm",
    "projection": "visual_projection",
}

CLIP_NAMES = {
    **{f"text.{ours}": theirs for ours, theirs in TEXT_NAMES.items()},
    **{f"vision.{ours}": theirs for ours, theirs in VISION_NAMES.items()},
    "logit_scale": "logit_scale",
}


# What transformers 5 saves of a tower alone begins with these, without the tower's name.
_BARE = ("embeddings.", "encoder.", "final_layer_norm.", "pre_layrnorm.", "post_layernorm.")


def _full_name(name: str, config: AnyClipConfig) -> str:
    if not name.startswith(_BARE):
        return name
    return f"{'text' if isinstance(config, ClipTextConfig) else 'vision'}_model.{name}"


def _network(config: AnyClipConfig) -> tuple[Callable[..., nnx.Module], dict[str, str]]:
    match config:
        case ClipTextConfig():
            return ClipText, TEXT_NAMES
        case ClipVisionConfig():
            return ClipVision, VISION_NAMES
        case ClipConfig():
            return Clip, CLIP_NAMES


def from_torch_names(tensors: Mapping[str, np.ndarray], config: AnyClipConfig) -> dict[str, Any]:
    """Parameters of the network of `config` from a transformers checkpoint, old or new.

    Raises:
      UserError: tensors are missing, unexpected or of another shape; it names them.
    """
    network, table = _network(config)
    # Old checkpoints store the row 0, 1, 2 ... beside the positions' embeddings.
    tensors = {
        _full_name(name, config): value
        for name, value in tensors.items()
        if not name.endswith(".position_ids")
    }
    abstract = abstract_params(lambda: network(config, rngs=nnx.Rngs(0)))
    return names.from_torch_names(tensors, table, abstract)


def to_torch_names(params: Mapping[str, Any], config: AnyClipConfig) -> dict[str, np.ndarray]:
    """The tensors of a transformers checkpoint from the network's parameters, a nested dict."""
    return names.to_torch_names(params, _network(config)[1])
