"""T5's encoder under the tensor names of transformers' T5EncoderModel."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import UserError
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.models.text_encoders.t5 import T5Config, T5Encoder
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
    number,
    read_keys,
    write_keys,
)
from jaxdiff.pretrained.key_mapping import from_torch_names, to_torch_names
from jaxdiff.pretrained.safetensors_io import Renamed

WHAT = "text_encoder_2/config.json"
ARCHITECTURE = "T5EncoderModel"

_LAYER = "encoder.block.{layer}.layer"
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
NAMES = {
    "token_embedding": "shared.weight",
    "position_bias": _BIAS,
    "blocks.attention_norm": f"{_LAYER}.0.layer_norm",
    "blocks.attention.q": f"{_LAYER}.0.SelfAttention.q",
    "blocks.attention.k": f"{_LAYER}.0.SelfAttention.k",
    "blocks.attention.v": f"{_LAYER}.0.SelfAttention.v",
    "blocks.attention.out": f"{_LAYER}.0.SelfAttention.o",
    "blocks.mlp_norm": f"{_LAYER}.1.layer_norm",
    "blocks.gate": f"{_LAYER}.1.DenseReluDense.wi_0",
    "blocks.up": f"{_LAYER}.1.DenseReluDense.wi_1",
    "blocks.down": f"{_LAYER}.1.DenseReluDense.wo",
    "final_norm": "encoder.final_layer_norm",
}

_COPY = "encoder.embed_tokens.weight"  # of `shared.weight`, in some files the only one

_WIDTH = integer(1, 2**17)

KEYS: Schema = {
    **BASE_KEYS,
    "vocab_size": Used(32128, integer(1, 2**24), "vocab_size"),
    "d_model": Used(512, _WIDTH, "width"),
    "d_kv": Used(64, _WIDTH, "head_dim"),
    "d_ff": Used(2048, _WIDTH, "mlp_width"),
    "num_layers": Used(6, integer(1, MOST_LAYERS), "depth"),
    "num_heads": Used(8, _WIDTH, "heads"),
    "relative_attention_num_buckets": Used(32, _WIDTH, "buckets"),
    "relative_attention_max_distance": Used(128, integer(1, 2**20), "max_distance"),
    "layer_norm_epsilon": Used(1e-6, number(0, 1), "norm_epsilon"),
    "feed_forward_proj": Only("gated-gelu", default="relu"),
    "dense_act_fn": Only("gelu_new"),
    "is_gated_act": Only(True),
    "is_decoder": OFF,
    "num_decoder_layers": Unused("of the decoder"),
    "scale_decoder_outputs": Unused("of the decoder"),
    "output_past": Unused("of the decoder"),
    "classifier_dropout": Unused("for training, or for a classifier"),
    "dropout_rate": Unused("for training, or for a classifier"),
    "n_positions": Unused("positions are relative"),
}
"""Schema of a T5 encoder's `config.json`."""


def read_t5_config(config: Any, what: str = WHAT) -> T5Config:
    """Read our config from that of transformers' T5EncoderModel.

    Raises:
      UserError: the config asks for something that this encoder does not have.
    """
    fields = named_fields(read_keys(what, config, KEYS), KEYS)
    if fields["buckets"] % 4 or fields["max_distance"] <= fields["buckets"] // 4:
        raise UserError(
            f"{what}: relative_attention_num_buckets is {fields['buckets']} and "
            f"relative_attention_max_distance {fields['max_distance']}: expected a multiple of 4, "
            "and a distance above a quarter of it; use another model."
        )
    return T5Config(**fields)


def write_t5_config(config: T5Config) -> dict[str, Any]:
    """Return transformers' config: the inverse of `read_t5_config`."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "t5",
        **write_keys(config, KEYS),
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


def t5_from_torch(
    tensors: Mapping[str, np.ndarray], config: T5Config, **options: Any
) -> dict[str, Any]:
    """Return the encoder's parameters from a transformers checkpoint.

    `options` and errors are those of `key_mapping.from_torch_names`.
    """
    shared = NAMES["token_embedding"]
    new_name = None if shared in tensors else shared
    renamed = Renamed(tensors, lambda name: new_name if name == _COPY else name)
    return from_torch_names(
        renamed, NAMES, abstract_params(bind_init(T5Encoder, config)), **options
    )


def t5_to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return a transformers checkpoint's tensors from the encoder's parameters."""
    return to_torch_names(params, NAMES)
