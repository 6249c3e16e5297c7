"""CLIP's parameters under the tensor names of transformers' CLIPModel and its two encoders."""

from collections.abc import Callable, Mapping
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
from jaxdiff.pretrained.config_check import (
    MOST_LAYERS,
    OFF,
    Kind,
    Only,
    Schema,
    Unused,
    Used,
    choice,
    integer,
    named_fields,
    optional,
    read_keys,
    side,
    write_keys,
)
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


_WIDTH = integer(1, 2**16)
_ENDS = ("", "_dict")
_SECTION = Kind("an object", lambda value: dict(value or {}))

# Of transformers' base class, in the files of its versions 2 to 5.
_WITHOUT_EFFECT = {
    "describes the file, or the form of the outputs": """
        architectures chunk_size_feed_forward dtype finetuning_task model_type name_or_path
        output_attentions output_hidden_states return_dict tokenizer_class torch_dtype torchscript
        transformers_version use_cache
    """,
    "for training, or for a classifier": """
        attention_dropout dropout gradient_checkpointing id2label initializer_factor
        initializer_range label2id problem_type use_bfloat16
    """,
    "for generation of text": """
        add_cross_attention bad_words_ids begin_suppress_tokens bos_token_id
        cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
        early_stopping encoder_no_repeat_ngram_size eos_token_id
        exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id is_decoder
        is_encoder_decoder length_penalty max_length min_length no_repeat_ngram_size
        num_beam_groups num_beams num_return_sequences output_scores pad_token_id prefix
        remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id
        suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
        tie_word_embeddings top_k top_p typical_p
    """,
}
BASE_KEYS: Schema = {
    **{key: Unused(why) for why, keys in _WITHOUT_EFFECT.items() for key in keys.split()},
    "pruned_heads": Only({}, [], None),
}
_BLOCKS: Schema = {
    **BASE_KEYS,
    "num_hidden_layers": Used(12, integer(1, MOST_LAYERS), "depth"),
    "hidden_act": Used("quick_gelu", choice(("quick_gelu", "gelu")), "activation"),
    "layer_norm_eps": Only(1e-5),
}
TEXT_KEYS: Schema = {
    **_BLOCKS,
    "vocab_size": Used(49408, integer(1, 2**24), "vocab_size"),
    "max_position_embeddings": Used(77, _WIDTH, "length"),
    "hidden_size": Used(512, _WIDTH, "width"),
    "num_attention_heads": Used(8, _WIDTH, "heads"),
    "intermediate_size": Used(2048, _WIDTH),
    "projection_dim": Used(512, optional(_WIDTH)),
    "eos_token_id": Used(49407, integer(0, 2**24)),
    "use_attention_mask": OFF,  # of diffusers' Stable Diffusion, for other text encoders
}
"""Schema of a text encoder's `config.json`."""

_ENDS_AT_LARGEST = 2  # a wrong id in OpenAI's configs, for which transformers uses the largest id


def read_text_config(
    config: Any, *, projected: bool, what: str = "text_encoder/config.json"
) -> ClipTextConfig:
    """Read our config from that of transformers' CLIPTextModel (`projected`: ...WithProjection).

    Raises:
      UserError: the config asks for something that this encoder does not have.
    """
    values = read_keys(what, config, TEXT_KEYS)
    end_id = values["eos_token_id"]
    return ClipTextConfig(
        **_size(what, values, TEXT_KEYS),
        projection_dim=_projection(what, values) if projected else None,
        end_id=None if end_id == _ENDS_AT_LARGEST else end_id,
    )


def _projection(what: str, values: Mapping[str, Any]) -> int:
    if values["projection_dim"] is None:
        raise UserError(f"{what}: projection_dim is null: expected a number; use another model.")
    return values["projection_dim"]


VISION_KEYS: Schema = {
    **_BLOCKS,
    "image_size": Used(224, side(1, 2**14), "image_size"),
    "patch_size": Used(32, side(1, 2**14), "patch_size"),
    "hidden_size": Used(768, _WIDTH, "width"),
    "num_attention_heads": Used(12, _WIDTH, "heads"),
    "intermediate_size": Used(3072, _WIDTH),
    "projection_dim": Unused("the config of both encoders states it"),
    "num_channels": Only(3),
}
"""Schema of the image encoder's part of CLIP's `config.json`."""

CLIP_KEYS: Schema = {
    **BASE_KEYS,
    "projection_dim": Used(512, _WIDTH),
    "logit_scale_init_value": Unused("for training; the weights have the trained value"),
    **{f"{name}_config{end}": Used(None, _SECTION) for name in ("text", "vision") for end in _ENDS},
}
"""Schema of CLIP's `config.json`."""


def read_clip_config(config: Any, what: str = "config.json") -> ClipConfig:
    """Read our config of both encoders from that of transformers' CLIPModel.

    Raises:
      UserError: the config asks for something that these encoders do not have.
    """
    values = read_keys(what, config, CLIP_KEYS)
    end = values["projection_dim"]

    def encoder(name: str, schema: Schema) -> dict[str, Any]:
        # In old files a second section overrides the first, its missing keys included.
        first, second = (values[f"{name}_config{end}"] for end in _ENDS)
        defaults = {k: rule.default for k, rule in schema.items() if not isinstance(rule, Unused)}
        return {**first, **(defaults if second else {}), **second, "projection_dim": end}

    where = f"{what}, vision_config"
    vision = read_keys(where, encoder("vision", VISION_KEYS), VISION_KEYS)
    return ClipConfig(
        text=read_text_config(
            encoder("text", TEXT_KEYS), projected=True, what=f"{what}, text_config"
        ),
        vision=ClipVisionConfig(**_size(where, vision, VISION_KEYS), projection_dim=end),
    )


def _size(what: str, values: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """Return the fields of either encoder."""
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        raise UserError(
            f"{what}: hidden_size is {width} and num_attention_heads {heads}: expected a multiple "
            "of the latter; use another model."
        )
    fields = named_fields(values, schema)
    return {**fields, "mlp_ratio": values["intermediate_size"] / fields["width"]}


def write_text_config(config: ClipTextConfig) -> dict[str, Any]:
    """Return transformers' config: the inverse of `read_text_config`."""
    kind = "CLIPTextModelWithProjection" if config.projection_dim else "CLIPTextModel"
    projection = {"projection_dim": config.projection_dim} if config.projection_dim else {}
    return projection | {
        "architectures": [kind],
        "model_type": "clip_text_model",
        **write_keys(config, TEXT_KEYS),
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
