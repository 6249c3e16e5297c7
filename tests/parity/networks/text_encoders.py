"""Configs of transformers' text encoders: their keys, values of each, and both sides' outputs."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxdiff.models.layers import bind_build, bind_init, bind_params
from jaxdiff.models.text_encoders.clip import Clip, ClipText, normalize_for_clip
from jaxdiff.models.text_encoders.qwen3 import Qwen3TextEncoder
from jaxdiff.models.text_encoders.t5 import T5Encoder
from jaxdiff.pretrained import clip_keys, qwen3_keys, t5_keys
from tests.parity.networks.keys_and_inputs import bound, random, signature, to_torch

IDS = np.array([[48, 7, 3, 2, 49, 0, 0, 0], [48, 2, 7, 49, 0, 0, 0, 0]])


def keys_of_transformers(kind):
    keys = {*signature(kind), *kind().to_dict()}
    return sorted(key for key in keys if not key.startswith("_"))


BLOCKS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TRANSFORMERS_VALUES = {
    "hidden_size": [64, None],
    "intermediate_size": [96],
    "num_hidden_layers": [3],
    "num_attention_heads": [2, 3],
    "hidden_act": ["gelu", "quick_gelu", "gelu_new", "relu", "silu"],
    "layer_norm_eps": [1e-6, 1e-3],
    "attention_dropout": [0.5],
    "projection_dim": [16, None],
    "vocab_size": [60],
    "max_position_embeddings": [16, 9],
    "eos_token_id": [2, 7, None, [49]],  # all prompts have 7
    "bos_token_id": [0, 3, None],
    "pad_token_id": [0, 1, None],
    "image_size": [8],
    "patch_size": [4],
    "num_channels": [1],
    "initializer_factor": [0.5],
    "initializer_range": [0.5],
    "logit_scale_init_value": [1.0],
    "chunk_size_feed_forward": [4],
    "dtype": ["float32", None],
    "architectures": [["Other"], None],
    "id2label": [{"0": "a", "1": "b"}],
    "label2id": [{"a": 0, "b": 1}],
    "problem_type": ["regression"],
    "model_type": ["clip"],
    "transformers_version": ["4.0.0", "9.0.0"],
    "text_config": [{"eos_token_id": 49}, {"hidden_size": 64, "eos_token_id": 49}],
    "vision_config": [{}],
    "text_config_dict": [{**BLOCKS, "vocab_size": 50, "max_position_embeddings": 8}],
}


class Text:
    kind, config_kind = transformers.CLIPTextModel, transformers.CLIPTextConfig
    projected, schema = False, clip_keys.TEXT_KEYS
    keys: ClassVar = keys_of_transformers(config_kind)
    small: ClassVar = {
        **BLOCKS,
        "num_attention_heads": 4,
        "vocab_size": 50,
        "max_position_embeddings": 8,
        "projection_dim": 24,
        "bos_token_id": 48,
        "pad_token_id": 0,
    }
    bases: ClassVar = {"1.x": {**small, "eos_token_id": 2}, "2.x": {**small, "eos_token_id": 49}}
    values: ClassVar = TRANSFORMERS_VALUES

    @classmethod
    def read(cls, config):
        return clip_keys.read_text_config(config, projected=cls.projected)

    @staticmethod
    def theirs(model, config):
        out = model(input_ids=torch.from_numpy(IDS), output_hidden_states=True)
        # transformers 5 has no final norm in hidden_states, transformers 4 neither.
        pooled = out.pooler_output if "pooler_output" in out else out.text_embeds
        parts = out.last_hidden_state, out.hidden_states[-2], pooled
        return np.concatenate([x.numpy().ravel() for x in parts])

    @staticmethod
    def ours(spec, tensors, config):
        params = clip_keys.clip_from_torch(tensors, spec, place=np.asarray)
        network, ids = bound(functools.partial(ClipText, spec), params), jnp.asarray(IDS)
        last = network(ids)
        parts = last.tokens, network(ids, hidden_layer=-2, final_norm=False).tokens, last.pooled
        return np.concatenate([np.asarray(x).ravel() for x in parts])


class TextProjection(Text):
    kind, projected = transformers.CLIPTextModelWithProjection, True
    bases: ClassVar = {"XL": {**Text.small, "eos_token_id": 49, "hidden_act": "gelu"}}


class BothClips:
    """The keys of CLIP's two encoders: KEY, text_config.KEY and vision_config.KEY."""

    kind, config_kind = transformers.CLIPModel, transformers.CLIPConfig
    vision_keys: ClassVar = keys_of_transformers(transformers.CLIPVisionConfig)
    keys: ClassVar = [
        *keys_of_transformers(config_kind),
        *(f"text_config.{key}" for key in Text.keys),
        *(f"vision_config.{key}" for key in vision_keys),
    ]
    schema: ClassVar = {
        **clip_keys.CLIP_KEYS,
        **{f"text_config.{key}": rule for key, rule in clip_keys.TEXT_KEYS.items()},
        **{f"vision_config.{key}": rule for key, rule in clip_keys.VISION_KEYS.items()},
    }
    vision: ClassVar = {**BLOCKS, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    bases: ClassVar = {
        "CLIP": {
            "projection_dim": 24,
            "text_config": {**Text.small, "eos_token_id": 49},
            "vision_config": vision,
        }
    }
    values: ClassVar = TRANSFORMERS_VALUES

    @staticmethod
    def read(config):
        return clip_keys.read_clip_config(config)

    @staticmethod
    def theirs(model, config):
        pixels = np.asarray(normalize_for_clip(jnp.asarray(random(2, 16, 16, 3))))
        out = model(input_ids=torch.from_numpy(IDS), pixel_values=to_torch(pixels))
        parts = out.text_embeds, out.image_embeds, out.logits_per_image
        return np.concatenate([x.numpy().ravel() for x in parts])

    @staticmethod
    def ours(spec, tensors, config):
        params = clip_keys.clip_from_torch(tensors, spec, place=np.asarray)
        network = bind_params(bind_init(Clip, spec), jax.tree.map(jnp.asarray, params))
        out = network(jnp.asarray(random(2, 16, 16, 3)), jnp.asarray(IDS))
        parts = out.text, out.image, out.logit_scale * out.image @ out.text.T
        return np.concatenate([np.asarray(x).ravel() for x in parts])


class Qwen:
    kind, config_kind = transformers.Qwen3Model, transformers.Qwen3Config
    schema = qwen3_keys.KEYS
    # Older files have both; transformers 5 reads them.
    keys: ClassVar = [*keys_of_transformers(config_kind), "rope_theta", "rope_scaling"]
    bases: ClassVar = {
        "3": {
            **BLOCKS,
            "vocab_size": 50,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
    }
    values: ClassVar = {
        **TRANSFORMERS_VALUES,
        "num_key_value_heads": [1, 4, 3, None],
        "head_dim": [16, 7, None],
        "rms_norm_eps": [1e-3],
        "rope_parameters": [
            {"rope_type": "default", "rope_theta": 100.0},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            None,
        ],
        "rope_theta": [100.0],
        "rope_scaling": [None, {"rope_type": "linear", "factor": 2.0}],
        "layer_types": [None, ["full_attention"] * 2, ["sliding_attention", "full_attention"]],
        "max_position_embeddings": [9],
    }

    @staticmethod
    def read(config):
        return qwen3_keys.read_qwen3_config(config)

    @staticmethod
    def theirs(model, config):
        mask = torch.from_numpy(IDS != 0)
        out = model(torch.from_numpy(IDS), attention_mask=mask, output_hidden_states=True)
        return np.stack([x.numpy() for x in out.hidden_states])

    @staticmethod
    def ours(spec, tensors, config):
        encoder = Qwen3TextEncoder(model=spec, hidden_layers=tuple(range(spec.depth + 1)))
        params = qwen3_keys.qwen3_from_torch(tensors, encoder, place=jnp.asarray)
        network = bind_params(bind_build(encoder), params)
        return np.stack(network(jnp.asarray(IDS), jnp.asarray(IDS != 0)))


class T5:
    kind, config_kind = transformers.T5EncoderModel, transformers.T5Config
    schema = t5_keys.KEYS
    keys: ClassVar = keys_of_transformers(config_kind)
    bases: ClassVar = {
        "v1.1": {
            "vocab_size": 50,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        }
    }
    values: ClassVar = {
        **TRANSFORMERS_VALUES,
        "relative_attention_num_buckets": [16, 4, 6],
        "relative_attention_max_distance": [5, 2, 128],
        "layer_norm_epsilon": [1e-3],
        "feed_forward_proj": ["relu", "gated-relu", "gated-silu", "gelu", "gated-gelu_new"],
        "dense_act_fn": ["relu", "gelu_new"],
    }

    @staticmethod
    def read(config):
        return t5_keys.read_t5_config(config)

    @staticmethod
    def theirs(model, config):
        return model(torch.from_numpy(IDS)).last_hidden_state.numpy()

    @staticmethod
    def ours(spec, tensors, config):
        params = t5_keys.t5_from_torch(tensors, spec, place=np.asarray)
        return bound(functools.partial(T5Encoder, spec), params)(jnp.asarray(IDS))
