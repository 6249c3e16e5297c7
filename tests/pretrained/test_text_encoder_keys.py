"""Configs of Qwen3 and T5 in the forms in which published models have them."""

import pytest

from jaxdiff.errors import UserError
from jaxdiff.models.text_encoders.qwen3 import Qwen3Config
from jaxdiff.models.text_encoders.t5 import T5Config
from jaxdiff.pretrained.qwen3_keys import read_qwen3_config
from jaxdiff.pretrained.t5_keys import read_t5_config

# Qwen/Qwen3-4B, and the T5 of black-forest-labs/FLUX.1-schnell, without keys of the base class.
QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "dense_act_fn": "gelu_new",
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}


def test_published_configs_are_our_defaults():
    assert read_qwen3_config(QWEN3_4B) == Qwen3Config()
    assert read_t5_config(T5_XXL) == T5Config()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["sliding_attention"] * 36}, "layer_types is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "'quantization_config'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"rope_parameters": "x"}, "rope_parameters is 'x': expected null or the default type"),
    ],
)
def test_what_qwen3_does_not_do_is_refused_by_name(wrong, message):
    with pytest.raises(UserError, match=message):
        read_qwen3_config({**QWEN3_4B, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"relative_attention_num_buckets": 30}, "relative_attention_num_buckets is 30"),
    ],
)
def test_what_t5_does_not_do_is_refused_by_name(wrong, message):
    with pytest.raises(UserError, match=message):
        read_t5_config({**T5_XXL, **wrong})
