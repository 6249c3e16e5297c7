"""Configs of diffusers' denoisers: their keys, values of each, and the outputs of both sides."""

import functools
from typing import ClassVar

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.flux import Flux
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionModel
from jaxdiff.models.denoisers.z_image import ZImage
from jaxdiff.models.layers import patchify
from jaxdiff.pretrained import flux_keys, unet_keys, z_image_keys
from tests.parity.networks.keys_and_inputs import bound, random, signature, to_torch

DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


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
