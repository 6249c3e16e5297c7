"""Configs of diffusers' autoencoders: their keys, values of each, and the outputs of both sides."""

import functools
from typing import ClassVar

import diffusers
import jax
import numpy as np
import torch

from jaxdiff.models.autoencoders.flux2 import Flux2Autoencoder
from jaxdiff.models.autoencoders.kl import Autoencoder
from jaxdiff.models.autoencoders.tiny import TinyAutoencoder
from jaxdiff.pretrained import autoencoder_keys, tiny_autoencoder_keys
from tests.parity.networks.keys_and_inputs import bound, random, signature, to_torch


def both_halves(network, config, z=None):
    """Return latents of an image and an image of latents z, as diffusers has them, in one row."""
    mean = jax.jit(network.encode)(random(1, 8, 8, config["in_channels"])).mode()
    z = random(1, 4, 4, config["latent_channels"]) if z is None else z
    decoded = jax.jit(lambda z: network.decode(network.from_latents(z)))(z)
    pair = network.to_latents(mean), decoded
    return np.concatenate([np.asarray(x).transpose(0, 3, 1, 2).ravel() for x in pair])


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

    @staticmethod
    def ours(spec, tensors, config):
        params = autoencoder_keys.autoencoder_from_torch(tensors, spec, place=np.asarray)
        return both_halves(bound(functools.partial(Autoencoder, spec), params), config)


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
        return both_halves(network, config, random(1, 2, 2, spec.latent_channels))


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
        return both_halves(bound(functools.partial(TinyAutoencoder, spec), params), config)
