"""Configs of diffusers and transformers: those that we know come back, the others are refused."""

import pytest

from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.diffusion.time_grids import TrainStepGrid
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.pretrained import autoencoder_keys, clip_keys, tiny_autoencoder_keys, unet_keys
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


UNET, VAE, TINY, TEXT = (
    unet_keys.read_unet_config,
    autoencoder_keys.read_autoencoder_config,
    tiny_autoencoder_keys.read_tiny_autoencoder_config,
    lambda config: clip_keys.read_text_config(config, projected=True),
)


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        *[(read, ["x"], "is not a config") for read in (UNET, VAE, TINY, TEXT)],
        (read_scheduling, ["x"], "does not support None"),
        (UNET, {"new_switch": False}, "new_switch"),
        (UNET, {"sample_size": [64, 32]}, r"sample_size is \[64, 32\]"),
        (UNET, {"sample_size": "64"}, "sample_size is '64'"),
        (UNET, {"sample_size": [64]}, "sample_size"),
        (UNET, {"block_out_channels": 320}, "block_out_channels is 320"),
        (UNET, {"block_out_channels": [320, 10**30]}, "block_out_channels"),
        (UNET, {"block_out_channels": [320] * 99}, "block_out_channels"),
        (UNET, {"down_block_types": ["DownBlock2D"]}, "down_block_types has 1 values"),
        (UNET, {"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
        (UNET, {"layers_per_block": [1, 2, 2, 2]}, "layers_per_block is"),
        (UNET, {"layers_per_block": 10**9}, "layers_per_block is"),
        (UNET, {"transformer_layers_per_block": [[1], [1], [1], [1]]}, "transformer_layers_per"),
        (UNET, {"only_cross_attention": [False, True, False, False]}, "only_cross_attention"),
        (UNET, {"norm_num_groups": None}, "norm_num_groups is None"),
        (UNET, {"in_channels": True}, "in_channels is True"),
        (UNET, {"in_channels": 4.5}, "in_channels is 4.5"),
        (UNET, {"addition_embed_type": "text_time"}, "addition_time_embed_dim None"),
        (UNET, {"use_linear_projection": "no"}, "use_linear_projection"),
        (VAE, {"block_out_channels": [32, 64]}, "down_block_types has 1 values"),
        (VAE, {"scaling_factor": 0}, "scaling_factor is 0"),
        (VAE, {"scaling_factor": float("inf")}, "scaling_factor is inf"),
        (VAE, {"use_quant_conv": 3}, "use_quant_conv is 3"),
        (VAE, {"out_channels": 6}, "out_channels"),
        (TINY, {"num_encoder_blocks": [1, 3]}, "encoder_block_out_channels"),
        (TINY, {"decoder_block_out_channels": [64, 64, 64, 32]}, "decoder_block_out_channels"),
        (TEXT, {"eos_token_id": [1, 2]}, "eos_token_id"),
        (TEXT, {"eos_token_id": None}, "eos_token_id is None"),
        (TEXT, {"projection_dim": None}, "projection_dim is null"),
        (TEXT, {"hidden_size": -1}, "hidden_size is -1"),
        (TEXT, {"use_attention_mask": True}, "use_attention_mask"),
        (clip_keys.read_clip_config, {"text_config": 3}, "text_config is 3"),
        (clip_keys.read_clip_config, {"vision_config": {"patch_size": [32, 16]}}, "patch_size"),
        (clip_keys.read_clip_config, {"vision_config": {"new": 1}}, "new"),
        (read_scheduling, STATED | {"steps_offset": 1000}, "steps_offset"),
        (read_scheduling, STATED | {"beta_start": "0.1"}, "beta_start"),
        (read_scheduling, STATED | {"_class_name": ["a"]}, "does not support"),
        (read_scheduling, STATED | {"timestep_spacing": "linspace"}, "timestep_spacing"),
    ],
)
def test_an_odd_value_is_refused_by_its_name(read, config, message):
    with pytest.raises(UserError, match=message):
        read(config)


@pytest.mark.parametrize(
    ("read", "config"),
    [
        (UNET, {"in_channels": 4.0, "sample_size": [64, 64], "upcast_attention": None}),
        (UNET, {"only_cross_attention": [False] * 4, "cross_attention_dim": [1280] * 4}),
        (UNET, {"projection_class_embeddings_input_dim": 80}),  # of other networks
        (VAE, {"sample_size": [32, 64]}),
        (TEXT, {"max_length": 20, "pruned_heads": {}, "torch_dtype": "float16"}),
    ],
)
def test_another_spelling_of_the_defaults(read, config):
    assert read(config) == read({})


def test_the_second_section_of_an_old_clip_overrides_the_first_with_its_defaults():
    old = {"text_config": {"hidden_size": 768}, "text_config_dict": {"num_attention_heads": 4}}
    text = clip_keys.read_clip_config(old).text
    assert (text.width, text.heads) == (512, 4)


def test_a_scheduler_is_of_the_class_that_the_pipeline_names():
    config = STATED | {"_class_name": "DDIMScheduler", "lambda_min_clipped": float("-inf")}
    assert isinstance(read_scheduling(config, "EulerDiscreteScheduler").solver, Euler)


def test_comments_and_null_are_ignored():
    assert unet_keys.read_unet_config({"_diffusers_version": "1", "some_new_thing": None})
