"""CLIP's parameters under the tensor names of transformers' CLIPModel and its two encoders."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from flax import nnx

from jaxdiff.errors import UserError
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.models.text_encoders.clip import (
    Clip,
    ClipConfig,
    ClipText,
    ClipTextConfig,
    ClipVision,
    ClipVisionConfig,
)
from jaxdiff.pretrained.config_check import Fixed, Keys, check_config, read_keys, write_keys
from jaxdiff.pretrained.key_mapping import from_torch_names, to_torch_names
from jaxdiff.pretrained.safetensors_io import Renamed

AnyClipConfig = ClipTextConfig | ClipVisionConfig | ClipConfig


def _block_names(encoder: str) -> dict[str, str]:
    layer = f"{encoder}.encoder.layers.{{layer}}"
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


# Prefixes of transformers 5 for checkpoints of a single encoder.
_BARE = ("embeddings.", "encoder.", "final_layer_norm.", "pre_layrnorm.", "post_layernorm.")


def _full_name(name: str, config: AnyClipConfig) -> str | None:
    if name.endswith(".position_ids"):
        return None  # old checkpoints store the indices of position_embedding
    if not name.startswith(_BARE):
        return name
    return f"{'text' if isinstance(config, ClipTextConfig) else 'vision'}_model.{name}"


_BLOCK_KEYS: Keys = {
    "num_hidden_layers": ("depth", 12),
    "hidden_act": ("activation", "quick_gelu"),
}
_TEXT_KEYS: Keys = {
    **_BLOCK_KEYS,
    "vocab_size": ("vocab_size", 49408),
    "max_position_embeddings": ("length", 77),
    "hidden_size": ("width", 512),
    "num_attention_heads": ("heads", 8),
}
_TEXT_READ = {*_TEXT_KEYS, "intermediate_size", "projection_dim", "eos_token_id"}

# Without effect on a trained encoder's outputs.
_IGNORED = """
    architectures attention_dropout bos_token_id chunk_size_feed_forward dropout dtype id2label
    initializer_factor initializer_range is_encoder_decoder label2id model_type output_attentions
    output_hidden_states pad_token_id problem_type return_dict torch_dtype transformers_version
"""

_TEXT_FIXED: Fixed = dict.fromkeys(_IGNORED.split()) | {"layer_norm_eps": (1e-5,)}

_ENDS_AT_LARGEST = 2  # a wrong id in OpenAI's configs, for which transformers uses the largest id


def read_text_config(
    config: Mapping[str, Any], *, projected: bool, what: str = "text_encoder/config.json"
) -> ClipTextConfig:
    """Read our config from that of transformers' CLIPTextModel (`projected`: ...WithProjection).

    Raises:
      UserError: the config asks for something that this encoder does not have.
    """
    check_config(what, config, _TEXT_READ, _TEXT_FIXED)
    end_id = config.get("eos_token_id", 49407)
    return ClipTextConfig(
        **_size(config, what, _TEXT_KEYS, hidden=2048),
        projection_dim=config.get("projection_dim", 512) if projected else None,
        end_id=None if end_id == _ENDS_AT_LARGEST else end_id,
    )


_VISION_KEYS: Keys = {
    **_BLOCK_KEYS,
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 32),
    "hidden_size": ("width", 768),
    "num_attention_heads": ("heads", 12),
}
_VISION_READ = {*_VISION_KEYS, "intermediate_size", "projection_dim"}
_VISION_FIXED: Fixed = {"layer_norm_eps": (1e-5,), "num_channels": (3,)}


def read_clip_config(config: Mapping[str, Any], what: str = "config.json") -> ClipConfig:
    """Read our config of both encoders from that of transformers' CLIPModel.

    Old files list all options of transformers for each encoder; only CLIP's are checked.

    Raises:
      UserError: the config asks for something that these encoders do not have.
    """
    end = config.get("projection_dim", 512)

    def encoder(name: str, keys: Collection[str]) -> dict[str, Any]:
        given = {
            **(config.get(f"{name}_config") or {}),
            **(config.get(f"{name}_config_dict") or {}),
        }
        return {key: value for key, value in given.items() if key in keys} | {"projection_dim": end}

    text = encoder("text", {*_TEXT_READ, "layer_norm_eps"})
    vision = encoder("vision", {*_VISION_READ, *_VISION_FIXED})
    check_config(f"{what}, vision_config", vision, _VISION_READ, _VISION_FIXED)
    return ClipConfig(
        text=read_text_config(text, projected=True, what=f"{what}, text_config"),
        vision=ClipVisionConfig(
            **_size(vision, f"{what}, vision_config", _VISION_KEYS, hidden=3072),
            projection_dim=end,
        ),
    )


def _size(config: Mapping[str, Any], what: str, keys: Keys, *, hidden: int) -> dict[str, Any]:
    """Return the fields of either encoder; `hidden` is the default of intermediate_size."""
    fields = read_keys(config, keys)
    activation = fields["activation"]
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(
            f"{what}: hidden_act is {activation!r}: expected quick_gelu or gelu; use another model."
        )
    return {**fields, "mlp_ratio": config.get("intermediate_size", hidden) / fields["width"]}


def write_text_config(config: ClipTextConfig) -> dict[str, Any]:
    """Return transformers' config: the inverse of `read_text_config`."""
    kind = "CLIPTextModelWithProjection" if config.projection_dim else "CLIPTextModel"
    projection = {"projection_dim": config.projection_dim} if config.projection_dim else {}
    return projection | {
        "architectures": [kind],
        "model_type": "clip_text_model",
        **write_keys(config, _TEXT_KEYS),
        "intermediate_size": round(config.width * config.mlp_ratio),
        "eos_token_id": _ENDS_AT_LARGEST if config.end_id is None else config.end_id,
    }


def _network(config: AnyClipConfig) -> tuple[Callable[..., nnx.Module], dict[str, str]]:
    match config:
        case ClipTextConfig():
            return ClipText, TEXT_NAMES
        case ClipVisionConfig():
            return ClipVision, VISION_NAMES
        case ClipConfig():
            return Clip, CLIP_NAMES


def clip_from_torch(
    tensors: Mapping[str, np.ndarray], config: AnyClipConfig, **options: Any
) -> dict[str, Any]:
    """Return the parameters of the network of `config` from a transformers checkpoint, old or new.

    `options` and errors are those of `key_mapping.from_torch_names`.
    """
    network, table = _network(config)
    abstract = abstract_params(bind_init(network, config))
    renamed = Renamed(tensors, lambda name: _full_name(name, config))
    return from_torch_names(renamed, table, abstract, **options)


def clip_to_torch(params: Mapping[str, Any], config: AnyClipConfig) -> dict[str, np.ndarray]:
    """Return a transformers checkpoint's tensors from the network's parameters, a nested dict."""
    return to_torch_names(params, _network(config)[1])
