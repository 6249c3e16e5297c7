"""Each key of the networks' configs is followed, refused by name, or without effect there as here.

Random weights of the same seed stand for a checkpoint. Each changed config is built by diffusers or
transformers and read by jaxdiff; where both accept it, the outputs are compared.
"""

import functools
import inspect
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.io.text import parse_json
from jaxdiff.models.autoencoders.flux2 import Flux2Autoencoder
from jaxdiff.models.autoencoders.kl import Autoencoder
from jaxdiff.models.autoencoders.tiny import TinyAutoencoder
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.flux import Flux
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionModel
from jaxdiff.models.denoisers.z_image import ZImage
from jaxdiff.models.layers import any_rngs, bind_build, bind_init, bind_params, patchify
from jaxdiff.models.text_encoders.clip import Clip, ClipText, normalize_for_clip
from jaxdiff.models.text_encoders.qwen3 import Qwen3TextEncoder
from jaxdiff.models.text_encoders.t5 import T5Encoder
from jaxdiff.pretrained import (
    autoencoder_keys,
    clip_keys,
    flux_keys,
    qwen3_keys,
    t5_keys,
    tiny_autoencoder_keys,
    unet_keys,
    z_image_keys,
)
from jaxdiff.pretrained.clip_folder import IMAGE_KEYS, read_image_config
from jaxdiff.pretrained.config_check import Unused
from jaxdiff.pretrained.stable_diffusion import INDEX_KEYS, PIPELINES

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
IDS = np.array([[48, 7, 3, 2, 49, 0, 0, 0], [48, 2, 7, 49, 0, 0, 0, 0]])


def signature(kind):
    return {
        key: x.default
        for key, x in list(inspect.signature(kind.__init__).parameters.items())[1:]
        if x.kind is not inspect.Parameter.VAR_KEYWORD
    }


def randomized(model):
    """Set every parameter at random, whatever its initialisation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tensors_of(model):
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def bound(network, params):
    return bind_params(lambda: network(rngs=any_rngs()), jax.tree.map(jnp.asarray, params))


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


class UNet:
    kind, schema = diffusers.UNet2DConditionModel, unet_keys.UNET_KEYS
    keys: ClassVar = list(signature(kind))
    small: ClassVar = {
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "down_block_types": [DOWN[1], DOWN[0]],
        "up_block_types": [UP[0], UP[1]],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
    }
    bases: ClassVar = {
        "1.x": small,
        "XL": {
            **small,
            "down_block_types": list(DOWN),
            "up_block_types": [UP[1], UP[0]],
            "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 2],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 20 + 6 * 8,
        },
    }
    values: ClassVar = {
        "sample_size": [16, [8, 8], [8, 16], None],
        "in_channels": [9, 8, None],
        "out_channels": [8],
        "down_block_types": [[DOWN[1], DOWN[1]], [DOWN[0], DOWN[0]], ["AttnDownBlock2D"] * 2],
        "up_block_types": [[UP[1], UP[1]], [UP[0], UP[0]], ["AttnUpBlock2D"] * 2],
        "mid_block_type": ["UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn", None],
        "only_cross_attention": [True, [True, False], [False, False], [True, True]],
        "block_out_channels": [[16, 16], [16, 32, 32], [24, 48]],
        "layers_per_block": [2, [1, 1], [1, 2]],
        "downsample_padding": [0, None],
        "mid_block_scale_factor": [2, 1.0],
        "act_fn": ["swish", "mish", "gelu", "relu"],
        "norm_num_groups": [4, None],
        "cross_attention_dim": [16, [24, 24], [24, 16]],
        "transformer_layers_per_block": [1, 2, [2, 1], [1, 1], [[1], [2]]],
        "reverse_transformer_layers_per_block": [2, [1, 1], [2, 1]],
        "encoder_hid_dim": [12],
        "encoder_hid_dim_type": ["text_proj", "text_image_proj", "ip_image_proj"],
        "attention_head_dim": [8, [8, 4], [4, 4], 16, None],
        "num_attention_heads": [2, [2, 2]],
        "class_embed_type": ["timestep", "identity", "projection", "simple_projection"],
        "addition_embed_type": ["text", "text_time", "text_image", "image", None],
        "addition_time_embed_dim": [16, None],
        "num_class_embeds": [4],
        "resnet_time_scale_shift": ["scale_shift", "ada_group"],
        "time_embedding_type": ["fourier"],
        "time_embedding_dim": [32, 64],
        "time_embedding_act_fn": ["silu", "gelu"],
        "timestep_post_act": ["silu", "gelu"],
        "time_cond_proj_dim": [8],
        "conv_in_kernel": [1, 5],
        "conv_out_kernel": [1, 5],
        "projection_class_embeddings_input_dim": [20 + 5 * 8, 80, None],
        "attention_type": ["gated", "gated-text-image"],
        "mid_block_only_cross_attention": [True, False],
        "cross_attention_norm": ["layer_norm", "group_norm"],
    }

    @staticmethod
    def read(config):
        return unet_keys.read_unet_config(config)

    @staticmethod
    def inputs(config):
        pooled, sizes = random(1, 20), np.arange(6, dtype=np.float32)[None] * 100
        cross = config["cross_attention_dim"]
        tokens = random(1, 7, cross[0] if isinstance(cross, list) else cross)
        return random(1, 8, 8, config["in_channels"]), tokens, pooled, sizes

    @classmethod
    def theirs(cls, model, config):
        x, tokens, pooled, sizes = cls.inputs(config)
        if config["projection_class_embeddings_input_dim"] == 60:
            sizes = sizes[:, :5]
        out = model(
            to_torch(x),
            torch.tensor([500]),
            torch.from_numpy(tokens),
            added_cond_kwargs={
                "text_embeds": torch.from_numpy(pooled),
                "time_ids": torch.from_numpy(sizes),
            },
        ).sample
        return out.numpy().transpose(0, 2, 3, 1)

    @classmethod
    def ours(cls, spec, tensors, config):
        params = unet_keys.unet_from_torch(tensors, spec, place=np.asarray)
        network = bound(functools.partial(UNet2DConditionModel, spec), params)
        x, tokens, pooled, sizes = cls.inputs(config)
        cond = Conditioning(tokens=tokens)
        if spec.added_width is not None:
            cond = Conditioning(tokens=tokens, pooled=pooled, size_crop=sizes)
            if spec.added_width == 60:
                cond = cond._replace(aesthetic_score=sizes[:, 4])
        return jax.jit(network.__call__)(x, jnp.full(1, 501 / 1000), cond)


class VAE:
    kind, schema = diffusers.AutoencoderKL, autoencoder_keys.AUTOENCODER_KEYS
    keys: ClassVar = list(signature(kind))
    bases: ClassVar = {
        "KL": {
            "block_out_channels": [8, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "norm_num_groups": 4,
        }
    }
    values: ClassVar = {
        "in_channels": [4],
        "out_channels": [6],
        "down_block_types": [["AttnDownEncoderBlock2D"] * 2],
        "up_block_types": [["AttnUpDecoderBlock2D"] * 2],
        "block_out_channels": [[8, 8], [8, 16, 16], [8]],
        "act_fn": ["swish", "mish", "gelu", "relu"],
        "sample_size": [16, [16, 16], [16, 32], None],
        "scaling_factor": [0.13025, 1.0, None],
        "shift_factor": [0.1, 0.0],
        "latents_mean": [[0.1] * 4],
        "latents_std": [[2.0] * 4],
    }

    @staticmethod
    def read(config):
        return autoencoder_keys.read_autoencoder_config(config)

    # diffusers' pipelines divide by scaling_factor and add shift_factor around the network.
    @staticmethod
    def theirs(model, config):
        mean = model.encode(to_torch(random(1, 8, 8, config["in_channels"]))).latent_dist.mean
        shift, scale = config["shift_factor"] or 0, config["scaling_factor"]
        z = to_torch(random(1, 4, 4, config["latent_channels"]))
        decoded = model.decode(z / scale + shift).sample
        return np.concatenate([((mean - shift) * scale).numpy().ravel(), decoded.numpy().ravel()])

    @classmethod
    def ours(cls, spec, tensors, config):
        params = autoencoder_keys.autoencoder_from_torch(tensors, spec, place=np.asarray)
        return cls.halves(bound(functools.partial(Autoencoder, spec), params), config)

    @staticmethod
    def halves(network, config, z=None):
        mean = jax.jit(network.encode)(random(1, 8, 8, config["in_channels"])).mode()
        z = random(1, 4, 4, config["latent_channels"]) if z is None else z
        decoded = jax.jit(lambda z: network.decode(network.from_latents(z)))(z)
        pair = network.to_latents(mean), decoded
        return np.concatenate([np.asarray(x).transpose(0, 3, 1, 2).ravel() for x in pair])


class Flux2VAE:
    kind, schema = diffusers.AutoencoderKLFlux2, autoencoder_keys.FLUX2_KEYS
    keys: ClassVar = list(signature(kind))
    bases: ClassVar = {
        "FLUX.2": {
            "block_out_channels": [8, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "norm_num_groups": 4,
            "latent_channels": 4,
        }
    }
    values: ClassVar = {
        **VAE.values,
        "latent_channels": [8],
        "decoder_block_out_channels": [[8, 8], [8, 16, 16], [8]],
        "patch_size": [[1, 1], [1, 4], [4, 1], None],
        "batch_norm_eps": [1e-2, 0.5, None],
    }

    @staticmethod
    def read(config):
        return autoencoder_keys.read_flux2_autoencoder_config(config)

    # diffusers' pipelines pack z and apply the statistics around the network.
    @staticmethod
    def theirs(model, config):
        pipeline = diffusers.Flux2KleinPipeline
        model.bn.running_mean.copy_(torch.linspace(-1, 1, len(model.bn.running_mean)))
        deviation = torch.sqrt(model.bn.running_var + config["batch_norm_eps"])[:, None, None]
        mean = model.bn.running_mean[:, None, None]
        z = model.encode(to_torch(random(1, 8, 8, config["in_channels"]))).latent_dist.mean
        latents = (pipeline._patchify_latents(z) - mean) / deviation
        z = to_torch(random(1, 2, 2, 4 * config["latent_channels"])) * deviation + mean
        decoded = model.decode(pipeline._unpatchify_latents(z)).sample
        return np.concatenate([latents.numpy().ravel(), decoded.numpy().ravel()])

    @staticmethod
    def ours(spec, tensors, config):
        params = autoencoder_keys.autoencoder_from_torch(tensors, spec, place=np.asarray)
        network = bound(functools.partial(Flux2Autoencoder, spec), params)
        return VAE.halves(network, config, random(1, 2, 2, spec.latent_channels))


class Tiny:
    kind, schema = diffusers.AutoencoderTiny, tiny_autoencoder_keys.TINY_KEYS
    keys: ClassVar = list(signature(kind))
    bases: ClassVar = {
        "tiny": {
            "encoder_block_out_channels": [8] * 2,
            "decoder_block_out_channels": [8] * 2,
            "num_encoder_blocks": [1, 2],
            "num_decoder_blocks": [2, 1],
        }
    }
    values: ClassVar = {
        "in_channels": [4],
        "out_channels": [6],
        "encoder_block_out_channels": [[16] * 2, [8, 16], [8] * 3],
        "decoder_block_out_channels": [[16] * 2, [16, 8]],
        "num_encoder_blocks": [[2, 1], [1, 1, 1]],
        "num_decoder_blocks": [[1, 1], [1]],
        "act_fn": ["silu", "gelu"],
        "upsample_fn": ["bilinear", "bicubic"],
        "upsampling_scaling_factor": [1, 4],
        "scaling_factor": [0.5],
        "shift_factor": [0.1, None],
    }

    @staticmethod
    def read(config):
        return tiny_autoencoder_keys.read_tiny_autoencoder_config(config)

    @staticmethod
    def theirs(model, config):
        latents = model.encode(to_torch(random(1, 8, 8, config["in_channels"]))).latents
        scale = config["scaling_factor"]
        z = to_torch(random(1, 4, 4, config["latent_channels"]))
        decoded = model.decode(z / scale + (config["shift_factor"] or 0)).sample
        return np.concatenate([(latents * scale).numpy().ravel(), decoded.numpy().ravel()])

    @staticmethod
    def ours(spec, tensors, config):
        params = tiny_autoencoder_keys.tiny_autoencoder_from_torch(tensors, spec, place=np.asarray)
        return VAE.halves(bound(functools.partial(TinyAutoencoder, spec), params), config)


def keys_of_transformers(*kinds):
    keys: ClassVar = {key for kind in kinds for key in [*signature(kind), *kind().to_dict()]}
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


class ZImageTransformer:
    kind, schema = diffusers.ZImageTransformer2DModel, z_image_keys.Z_IMAGE_KEYS
    keys: ClassVar = list(signature(kind))
    bases: ClassVar = {
        "Z-Image": {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 8, 8],
        }
    }
    values: ClassVar = {
        "all_patch_size": [[1], [2, 4], [4]],
        "all_f_patch_size": [[2], [1, 1]],
        "in_channels": [8, None],
        "dim": [64, 34, 33, None],
        "n_layers": [2, 0],
        "n_refiner_layers": [2, 0],
        "n_heads": [1, 4],
        "n_kv_heads": [1, 4, None],
        "norm_eps": [1e-2, 0],
        "cap_feat_dim": [8, None],
        "siglip_feat_dim": [8],
        "rope_theta": [100, 1e4],
        "t_scale": [1, 100.0],
        "axes_dims": [[6, 6, 4], [8, 8], [4, 4, 4, 4], [4, 4, 6], [5, 5, 6]],
        "axes_lens": [[34, 8, 8], [16, 8, 8], [64, 2, 8], [64, 8], [64, 8, 8, 8]],
    }

    @staticmethod
    def read(config):
        return z_image_keys.read_z_image_config(config)

    @staticmethod
    def inputs(config):
        return random(1, 4, 6, config["in_channels"]), random(1, 5, config["cap_feat_dim"])

    @classmethod
    def theirs(cls, model, config):
        x, tokens = cls.inputs(config)
        latents = to_torch(x)[0][:, None]
        out = model([latents], torch.tensor([0.6]), [torch.from_numpy(tokens[0])]).sample
        return -out[0][:, 0].permute(1, 2, 0).numpy()[None]

    @classmethod
    def ours(cls, spec, tensors, config):
        params = z_image_keys.z_image_from_torch(tensors, spec, place=np.asarray)
        network = bound(functools.partial(ZImage, spec), params)
        x, tokens = map(jnp.asarray, cls.inputs(config))
        return jax.jit(network.__call__)(x, jnp.full(1, 0.4), Conditioning(tokens=tokens))


class Flux1:
    kind, schema = diffusers.FluxTransformer2DModel, flux_keys.FLUX1_KEYS
    keys: ClassVar = list(signature(kind))
    small: ClassVar = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": [4, 6, 6],
    }
    bases: ClassVar = {"schnell": small, "dev": {**small, "guidance_embeds": True}}
    values: ClassVar = {
        "in_channels": [32, 18, None],
        "out_channels": [16, 32, 0],
        "num_layers": [2, 0],
        "num_single_layers": [2, 0],
        "attention_head_dim": [8, 32],
        "num_attention_heads": [1, 3],
        "joint_attention_dim": [8],
        "pooled_projection_dim": [8],
        "axes_dims_rope": [[8, 4, 4], [4, 4, 8], [4, 6], [4, 4, 4, 4], [4, 6, 4], [3, 7, 6]],
        "timestep_guidance_channels": [16, 33],
        "mlp_ratio": [2, 2.5, 3, 0.01],
        "rope_theta": [100, 10000],
        "eps": [0.01, 1e-5, 0],
        "patch_size": [2],
    }

    @staticmethod
    def read(config):
        return flux_keys.read_flux1_config(config)

    @staticmethod
    def inputs(config, patch):
        x = random(1, 2 * patch, 3 * patch, config["in_channels"] // patch**2)
        tokens = jnp.asarray(random(1, 5, config["joint_attention_dim"]))
        guidance = jnp.full(1, 3.5) if config["guidance_embeds"] else None
        pooled = config.get("pooled_projection_dim")
        pooled = None if pooled is None else jnp.asarray(random(1, pooled))
        return x, Conditioning(tokens=tokens, pooled=pooled, guidance=guidance)

    @classmethod
    def theirs(cls, model, config):
        is_first = config.get("pooled_projection_dim") is not None
        x, cond = cls.inputs(config, 2 if is_first else 1)
        packed = patchify(jnp.asarray(x), 2 if is_first else 1, channels_first=True)
        places = [[0, row, column, 0] for row in range(2) for column in range(3)]
        words = [[0, 0, 0, 0 if is_first else i] for i in range(5)]
        given = {
            "hidden_states": packed,
            "encoder_hidden_states": cond.tokens,
            "timestep": np.float32([0.4]),
            "img_ids": np.float32(places)[:, : 3 if is_first else 4],
            "txt_ids": np.float32(words)[:, : 3 if is_first else 4],
            "guidance": cond.guidance,
        }
        if is_first:
            given["pooled_projections"] = cond.pooled
        given = {k: None if v is None else torch.tensor(np.array(v)) for k, v in given.items()}
        return model(**given).sample.numpy()

    @classmethod
    def ours(cls, spec, tensors, config):
        params = flux_keys.flux_from_torch(tensors, spec, place=np.asarray)
        network = bound(functools.partial(Flux, spec), params)
        x, cond = cls.inputs(config, spec.patch_size)
        out = jax.jit(network.__call__)(x, jnp.full(1, 0.4), cond)
        return patchify(out, spec.patch_size, channels_first=True)


class Flux2(Flux1):
    kind, schema = diffusers.Flux2Transformer2DModel, flux_keys.FLUX2_KEYS
    keys: ClassVar = list(signature(kind))
    small: ClassVar = {
        **{key: x for key, x in Flux1.small.items() if key != "pooled_projection_dim"},
        "timestep_guidance_channels": 32,
        "axes_dims_rope": [4, 4, 4, 4],
    }
    bases: ClassVar = {"dev": small, "klein": {**small, "guidance_embeds": False}}
    values: ClassVar = {
        **Flux1.values,
        "axes_dims_rope": [[6, 2, 4, 4], [4, 6, 6], [4, 4, 4, 6], [3, 5, 4, 4]],
    }

    @staticmethod
    def read(config):
        return flux_keys.read_flux2_config(config)


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


PARTS = [
    UNet,
    ZImageTransformer,
    Flux1,
    Flux2,
    VAE,
    Flux2VAE,
    Tiny,
    Text,
    TextProjection,
    BothClips,
    Qwen,
    T5,
]
SAMPLE = [
    # In CI: followed, refused and without effect, of each network.
    (UNet, "1.x", "class_embed_type"),
    (UNet, "1.x", "act_fn"),
    (Flux1, "schnell", "axes_dims_rope"),
    (Flux1, "dev", "out_channels"),
    (Flux2, "klein", "mlp_ratio"),
    (Flux2, "dev", "guidance_embeds"),
    (VAE, "KL", "act_fn"),
    (VAE, "KL", "mid_block_add_attention"),
    (ZImageTransformer, "Z-Image", "axes_lens"),
    (ZImageTransformer, "Z-Image", "n_kv_heads"),
    (Flux2VAE, "FLUX.2", "decoder_block_out_channels"),
    (Flux2VAE, "FLUX.2", "batch_norm_eps"),
    (Tiny, "tiny", "latent_magnitude"),
    (Tiny, "tiny", "num_decoder_blocks"),
    (Text, "2.x", "eos_token_id"),
    (TextProjection, "XL", "projection_dim"),
    (BothClips, "CLIP", "vision_config.patch_size"),
    (Qwen, "3", "rope_parameters"),
    (T5, "v1.1", "feed_forward_proj"),
]


def full(part, base):
    """Return a base config with all keys, as the library writes it."""
    if hasattr(part, "config_kind"):
        config = part.config_kind(**part.bases[base]).to_dict()
    else:
        config = {**signature(part.kind), **part.bases[base]}
    return json.loads(json.dumps(config))


def changed(config, key, value):
    *section, last = key.split(".")
    if section:
        return {**config, section[0]: {**config[section[0]], last: value}}
    return {**config, key: value}


def values_of(part, base, key):
    """Other values of a key: those of the part, or a switch flipped, or a number changed."""
    name = key.rpartition(".")[2]
    if name in part.values:
        return part.values[name]
    config = full(part, base)
    section, _, _ = key.rpartition(".")
    default = (config[section] if section else config).get(name)
    if isinstance(default, bool) or default is None:
        return [not default, None]
    assert isinstance(default, int | float), f"no other values are known for {key}"
    return [default + 1, default / 2] if default else [default + 1]


def read(part, config):
    """Return the specification of a config, or the message of its refusal."""
    try:
        return part.read(parse_json(json.dumps(config), "config", infinities=True))
    except UserError as error:
        return str(error)


def expected_of(part, config):
    """Return their output and tensors, or None where they fail or give NaN."""
    try:
        if hasattr(part, "config_kind"):
            model = randomized(part.kind(part.config_kind(**config)))
        else:
            model = randomized(part.kind.from_config(config))
        with torch.no_grad():
            output = part.theirs(model, config)
    except Exception:  # an odd value may fail anywhere
        return None
    return (output, tensors_of(model)) if np.isfinite(output).all() else None


def outcome(part, base, key, value):
    """Return what is wrong, or "" for a value that is followed, refused or without effect."""
    config = changed(full(part, base), key, value)
    spec, name = read(part, config), key.rpartition(".")[2]
    if isinstance(spec, str):
        return "" if name in spec else f"refused without its name: {spec}"
    expected = expected_of(part, config)
    if expected is None:
        return ""
    output, tensors = expected
    try:
        found = np.asarray(part.ours(spec, tensors, config))
    except UserError as error:
        return "" if name in str(error) else f"refused without its name: {error}"
    if found.shape != output.shape:
        return f"{found.shape} instead of {output.shape}"
    away = np.abs(found - output).max() / np.ptp(output)
    if not away <= 1e-3:
        return f"{away:.1e} away"
    if isinstance(part.schema.get(key), Unused):
        unchanged, _ = expected_of(part, full(part, base))
        if not np.array_equal(output, unchanged):
            return "declared without effect, and has one"
    return ""


def wrong_of(part, base, key):
    for value in values_of(part, base, key):
        if why := outcome(part, base, key, value):
            yield f"{part.__name__} {base}, {key}={value!r}: {why}"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_key_is_declared(part):
    assert [key for key in part.keys if key not in part.schema] == []


@pytest.mark.nightly
@pytest.mark.parametrize(("part", "base"), [(part, base) for part in PARTS for base in part.bases])
def test_the_base_is_followed(part, base):
    config = full(part, base)
    output, tensors = expected_of(part, config)
    found = np.asarray(part.ours(read(part, config), tensors, config))
    assert np.abs(found - output).max() <= 1e-3 * np.ptp(output)


@pytest.mark.parametrize(("part", "base", "key"), SAMPLE)
def test_some_keys(part, base, key):
    assert list(wrong_of(part, base, key)) == []


@pytest.mark.nightly
@pytest.mark.parametrize(("part", "base"), [(part, base) for part in PARTS for base in part.bases])
def test_all_keys(part, base):
    assert [why for key in part.keys for why in wrong_of(part, base, key)] == []


@pytest.mark.parametrize("name", PIPELINES)
def test_every_key_of_an_index_is_declared(name):
    given = signature(getattr(diffusers, name))
    schema = INDEX_KEYS["XL" in name]
    assert [key for key in given if key not in schema] == []


# transformers' processor of the size that a CLIP reads, on images of this size.
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
IMAGE_BASE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
IMAGE_VALUES = {
    "image_mean": [[0.5, 0.5, 0.5]],
    "image_std": [[0.5, 0.5, 0.5]],
    "size": [16, {"height": 16, "width": 16}, {"shortest_edge": 24}, 24, None],
    "crop_size": [16, {"height": 16, "width": 16}, {"height": 8, "width": 8}, 8, None],
    "resample": [0, 2],
    "rescale_factor": [1 / 127.5],
    "do_pad": [True],
    "pad_size": [{"height": 16, "width": 16}],
    "data_format": ["channels_first"],
    "input_data_format": ["channels_last"],
    "device": ["cpu"],
    "return_tensors": ["np"],
    "disable_grouping": [True],
    "image_seq_length": [5],
    "image_processor_type": ["CLIPFeatureExtractor"],
}


def image_keys():
    from transformers.processing_utils import ImagesKwargs

    return sorted({*ImagesKwargs.__annotations__, *transformers.CLIPImageProcessor().to_dict()})


def test_every_key_of_an_image_processor():
    plain = json.loads(transformers.CLIPImageProcessor(**IMAGE_BASE).to_json_string())
    ours = np.asarray(normalize_for_clip(jnp.asarray(IMAGES / 127.5 - 1, jnp.float32)))
    wrong = [f"{key} is not declared" for key in image_keys() if key not in IMAGE_KEYS]
    for key in image_keys():
        default = plain.get(key)
        for value in IMAGE_VALUES.get(key, [not default]):
            config = json.loads(json.dumps({**plain, key: value}))
            try:
                read_image_config(config, "preprocessor_config.json", 16)
            except UserError as error:
                if key not in str(error):
                    wrong.append(f"{key}={value!r}: refused without its name: {error}")
                continue
            try:
                processor = transformers.CLIPImageProcessor.from_dict(config)
                pixels = processor(list(IMAGES), return_tensors="np")["pixel_values"]
            except Exception:  # an odd value may fail anywhere
                continue
            if pixels.shape != (2, 3, 16, 16):
                wrong.append(f"{key}={value!r}: {pixels.shape}")
            elif np.abs(pixels.transpose(0, 2, 3, 1) - ours).max() > 1e-3:
                wrong.append(f"{key}={value!r}: other pixels")
    assert wrong == []
