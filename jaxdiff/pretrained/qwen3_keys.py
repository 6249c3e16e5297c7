"""Qwen3's parameters under the tensor names of transformers' Qwen3ForCausalLM and Qwen3Model.

Only blocks up to the last hidden state that is read are loaded, and the head that predicts words
never is. `qwen3_unused` returns what is left out, so that an export can hold it.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.layers import abstract_params, bind_build
from jaxdiff.models.text_encoders.qwen3 import Qwen3Config, Qwen3TextEncoder
from jaxdiff.pretrained.clip_keys import BASE_KEYS
from jaxdiff.pretrained.config_check import (
    MOST_LAYERS,
    OFF,
    Kind,
    Only,
    Schema,
    Unused,
    Used,
    integer,
    named_fields,
    number,
    optional,
    read_keys,
    write_keys,
)
from jaxdiff.pretrained.key_mapping import from_torch_names, to_torch_names
from jaxdiff.pretrained.safetensors_io import Renamed

WHAT = "text_encoder/config.json"
ARCHITECTURES = "Qwen3ForCausalLM", "Qwen3Model"  # with and without the head

_LAYER = "model.layers.{layer}"
NAMES = {
    "token_embedding": "model.embed_tokens.weight",
    "blocks.attention_norm": f"{_LAYER}.input_layernorm",
    "blocks.attention.q": f"{_LAYER}.self_attn.q_proj",
    "blocks.attention.k": f"{_LAYER}.self_attn.k_proj",
    "blocks.attention.v": f"{_LAYER}.self_attn.v_proj",
    "blocks.attention.out": f"{_LAYER}.self_attn.o_proj",
    "blocks.attention.q_norm": f"{_LAYER}.self_attn.q_norm",
    "blocks.attention.k_norm": f"{_LAYER}.self_attn.k_norm",
    "blocks.mlp_norm": f"{_LAYER}.post_attention_layernorm",
    "blocks.gate": f"{_LAYER}.mlp.gate_proj",
    "blocks.up": f"{_LAYER}.mlp.up_proj",
    "blocks.down": f"{_LAYER}.mlp.down_proj",
    "final_norm": "model.norm",
}

_WIDTH = integer(1, 2**17)
_THETA = number(0, 1e12)


def _full_attention(value: Any) -> None:
    """Check that no layer's attention is limited to a window."""
    if value is not None and set(value) != {"full_attention"}:
        raise ValueError


def _rope(value: Any) -> float | None:
    """Return the theta of `rope_parameters`, the form of transformers 5."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError
    if value.get("rope_type", "default") != "default" or set(value) - {"rope_type", "rope_theta"}:
        raise ValueError
    return _THETA.parse(value["rope_theta"]) if "rope_theta" in value else None


KEYS: Schema = {
    **BASE_KEYS,
    "vocab_size": Used(151936, integer(1, 2**24), "vocab_size"),
    "hidden_size": Used(4096, _WIDTH, "width"),
    "intermediate_size": Used(22016, _WIDTH, "mlp_width"),
    "num_hidden_layers": Used(32, integer(1, MOST_LAYERS), "depth"),
    "num_attention_heads": Used(32, _WIDTH, "heads"),
    "num_key_value_heads": Used(32, optional(_WIDTH), "kv_heads"),
    "head_dim": Used(128, _WIDTH, "head_dim"),
    "rms_norm_eps": Used(1e-6, number(0, 1), "norm_epsilon"),
    "rope_theta": Used(None, optional(_THETA)),
    "rope_parameters": Used(None, Kind("null or the default type with its rope_theta", _rope)),
    "rope_scaling": Only(None),
    "hidden_act": Only("silu"),
    "attention_bias": OFF,
    "use_sliding_window": OFF,
    "layer_types": Used(None, Kind("null or only full_attention", _full_attention)),
    "sliding_window": Unused("of use_sliding_window, which must be off"),
    "max_window_layers": Unused("of use_sliding_window, which must be off"),
    "max_position_embeddings": Unused("prompts are shorter"),
}
"""Schema of a Qwen3's `config.json`."""

_DEFAULT_THETA = 10_000.0


def read_qwen3_config(config: Any, what: str = WHAT) -> Qwen3Config:
    """Read our config from that of transformers' Qwen3ForCausalLM or Qwen3Model.

    Raises:
      UserError: the config asks for something that this network does not have.
    """
    values = read_keys(what, config, KEYS)
    fields = named_fields(values, KEYS)
    if fields["kv_heads"] is None:
        fields["kv_heads"] = fields["heads"]
    if fields["heads"] % fields["kv_heads"] or fields["head_dim"] % 2:
        raise UserError(
            f"{what}: num_attention_heads is {fields['heads']}, num_key_value_heads "
            f"{fields['kv_heads']} and head_dim {fields['head_dim']}: expected a multiple of the "
            "second, and an even head_dim; use another model."
        )
    theta = values["rope_parameters"] or values["rope_theta"] or _DEFAULT_THETA
    return Qwen3Config(**fields, rope_theta=theta)


def write_qwen3_config(encoder: Qwen3TextEncoder, *, whole: bool) -> dict[str, Any]:
    """Return the config of the tensors that `qwen3_to_torch` returns.

    Args:
      encoder: the encoder.
      whole: whether `qwen3_unused` is added to them.
    """
    depth = encoder.model.depth if whole else _written_depth(encoder)
    rope = {"rope_type": "default", "rope_theta": encoder.model.rope_theta}
    return {
        "architectures": [ARCHITECTURES[0 if whole else 1]],
        "model_type": "qwen3",
        **write_keys(encoder.model, KEYS),
        "num_hidden_layers": depth,
        "rope_theta": encoder.model.rope_theta,
        "rope_parameters": rope,
    }


def _written_depth(encoder: Qwen3TextEncoder) -> int:
    """Return the number of blocks with which transformers gives the same hidden states.

    It normalises the last of them: above a state that is read before the norm, there must be one.
    """
    return min(encoder.hidden_layers[-1] + 1, encoder.model.depth)


def _name(name: str, encoder: Qwen3TextEncoder) -> str | None:
    """Return a tensor's name in `NAMES`, or None if the encoder does not read it."""
    name = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
    last, depth = encoder.hidden_layers[-1], encoder.model.depth
    layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
    above = layer is not None and last <= int(layer[1]) < depth
    unread = above or name == "lm_head.weight" or name.endswith(".inv_freq")
    return None if unread or (name == "model.norm.weight" and last < depth) else name


def qwen3_from_torch(
    tensors: Mapping[str, np.ndarray], encoder: Qwen3TextEncoder, **options: Any
) -> dict[str, Any]:
    """Return the encoder's parameters from a transformers checkpoint.

    `options` and errors are those of `key_mapping.from_torch_names`.
    """
    renamed = Renamed(tensors, lambda name: _name(name, encoder))
    return from_torch_names(renamed, NAMES, abstract_params(bind_build(encoder)), **options)


def qwen3_unused(
    tensors: Mapping[str, np.ndarray], encoder: Qwen3TextEncoder
) -> Mapping[str, np.ndarray]:
    """Return the tensors of a checkpoint that `qwen3_from_torch` does not read, each on access."""
    return Renamed(tensors, lambda name: name if _name(name, encoder) is None else None)


def qwen3_to_torch(
    params: Mapping[str, Any],
    encoder: Qwen3TextEncoder,
    unused: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Return a transformers checkpoint's tensors from the encoder's parameters.

    Args:
      params: of the encoder, a nested dict.
      encoder: the encoder.
      unused: `qwen3_unused` of the original checkpoint. Without it, blocks that are not read are
        left out, and one that returns its input takes the place of the first of them.
    """
    tensors = to_torch_names(params, NAMES)
    if unused is not None:
        bare = any(name.startswith(("layers.", "norm.")) for name in unused)
        return {**(_without_prefix(tensors) if bare else tensors), **unused}
    last = encoder.hidden_layers[-1]
    if last == encoder.model.depth:
        return _without_prefix(tensors)
    below, above = f"model.layers.{last - 1}.", f"model.layers.{last}."
    identity = {
        name.replace(below, above): np.zeros_like(value)
        for name, value in tensors.items()
        if name.startswith(below)
    }
    dtype = tensors["model.embed_tokens.weight"].dtype
    norm = {"model.norm.weight": np.ones(encoder.model.width, dtype)}
    return _without_prefix(tensors | identity | norm)


def _without_prefix(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors under the names of Qwen3Model, which has no head."""
    return {name.removeprefix("model."): value for name, value in tensors.items()}
