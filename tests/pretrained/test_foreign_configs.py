"""Configs of diffusers and transformers: those that we know come back, the others are refused."""

import pytest

from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.diffusion.time_grids import TrainStepGrid
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.pretrained import autoencoder_keys, clip_keys, unet_keys
from jaxdiff.pretrained.presets import CLIP_L, OPENCLIP_G, OPENCLIP_H, REFINER, SD1, SD2, XL
from jaxdiff.pretrained.scheduler import Scheduling, read_scheduling, write_scheduling
from jaxdiff.sampling.solvers_ode import DDIM, PLMS, DPMSolverPP2M, Euler

INPAINTING = UNet2DConditionConfig(in_channels=9)


@pytest.mark.parametrize("config", [SD1, SD2, XL, REFINER, INPAINTING])
def test_a_unet_comes_back(config):
    assert unet_keys.read_unet_config(unet_keys.write_unet_config(config)) == config


@pytest.mark.parametrize(
    "config",
    [
        AutoencoderConfig(),
        AutoencoderConfig(latent_channels=16, use_quant_conv=False, shift_factor=0.1159),
    ],
)
def test_an_autoencoder_comes_back(config):
    assert (
        autoencoder_keys.read_autoencoder_config(autoencoder_keys.write_autoencoder_config(config))
        == config
    )


@pytest.mark.parametrize("config", [CLIP_L, OPENCLIP_H, OPENCLIP_G])
def test_a_text_encoder_comes_back(config):
    written = clip_keys.write_text_config(config)
    assert (
        clip_keys.read_text_config(written, projected=config.projection_dim is not None) == config
    )


STATED = {"beta_schedule": "scaled_linear", "clip_sample": False}

SCHEDULINGS = [
    Scheduling(
        ScaledLinear(), "eps", PLMS(), TrainStepGrid(offset=1, ends_at="first_step"), "unit"
    ),
    Scheduling(
        ScaledLinear(zero_terminal_snr=True), "v", DDIM(), TrainStepGrid(spacing="trailing"), "unit"
    ),
    Scheduling(ScaledLinear(), "eps", Euler(), TrainStepGrid(offset=1, rounded=False), "unit"),
    Scheduling(
        ScaledLinear(),
        "v",
        DPMSolverPP2M(),
        TrainStepGrid(spacing="linspace", skip_last=True),
        "unit",
    ),
]


@pytest.mark.parametrize("scheduling", SCHEDULINGS, ids=lambda s: type(s.solver).__name__)
def test_a_scheduler_comes_back(scheduling):
    assert read_scheduling(write_scheduling(scheduling)) == scheduling


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        (
            unet_keys.read_unet_config,
            {"class_embed_type": "timestep"},
            "class_embed_type is 'timestep'",
        ),
        (
            unet_keys.read_unet_config,
            {"attention_heads_of_gold": 3},
            "attention_heads_of_gold.*is unknown",
        ),
        (
            unet_keys.read_unet_config,
            {"down_block_types": ["KDownBlock2D"] * 4},
            "down_block_types is .*KDown",
        ),
        (
            unet_keys.read_unet_config,
            {"attention_head_dim": [8, 8]},
            "has 2 values: expected one for all",
        ),
        (autoencoder_keys.read_autoencoder_config, {"latents_mean": [0.1]}, "latents_mean"),
        (autoencoder_keys.read_autoencoder_config, {"down_block_types": ["AttnDown"]}, "AttnDown"),
        (lambda c: clip_keys.read_text_config(c, projected=False), {"hidden_act": "relu"}, "relu"),
        (read_scheduling, {"_class_name": "KarrasVeScheduler"}, "does not support KarrasVe"),
        (read_scheduling, {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
        (read_scheduling, STATED | {"prediction_type": "flow"}, "prediction_type is 'flow'"),
        (read_scheduling, STATED | {"use_karras_sigmas": True}, "use_karras_sigmas"),
        # diffusers' defaults of missing keys
        (read_scheduling, {}, "beta_schedule is 'linear'"),
        (read_scheduling, {"beta_schedule": "scaled_linear"}, "clip_sample is True"),
    ],
)
def test_what_jaxdiff_does_not_have_is_refused(read, config, message):
    with pytest.raises(UserError, match=message):
        read(config)


def test_comments_and_null_are_ignored():
    assert unet_keys.read_unet_config({"_diffusers_version": "1", "some_new_thing": None})
