"""Stable Diffusion 1.x, 2.x and XL in diffusers' layout (see `pipeline_folder`).

unet/  vae/  text_encoder/  text_encoder_2/  tokenizer/  tokenizer_2/  scheduler/

XL has both text encoders, its refiner the second alone, and the others the first alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    StableDiffusionXLConditioner,
)
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained import autoencoder_folder, clip_keys, unet_keys
from jaxdiff.pretrained.autoencoder_folder import PublishedAutoencoder
from jaxdiff.pretrained.config_check import FLAG, Schema, Unused, Used
from jaxdiff.pretrained.pipeline_folder import (
    COMMON_KEYS,
    ENCODERS,
    PipelineFamily,
    WrittenSpec,
    part_key,
    read_index,
    read_part_config,
)
from jaxdiff.pretrained.scheduler import (
    GRIDS,
    SCHEDULERS,
    Scheduling,
    read_scheduling,
    write_scheduling,
)
from jaxdiff.sampling.sampler import Sampler

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)

_ALONE = {
    "unet": part_key("UNet2DConditionModel"),
    "vae": part_key("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": part_key("CLIPTextModel"),
    "tokenizer": part_key("CLIPTokenizer", "CLIPTokenizerFast"),
}
_SECOND = {
    "text_encoder_2": part_key("CLIPTextModelWithProjection"),
    "tokenizer_2": part_key("CLIPTokenizer", "CLIPTokenizerFast"),
}
_COMMON: Schema = {
    **COMMON_KEYS,
    **_ALONE,
    "safety_checker": Unused("judges finished images"),
    "requires_safety_checker": Unused("judges finished images"),
}
INDEX_KEYS: dict[bool, Schema] = {
    False: _COMMON,
    True: {
        **_COMMON,
        **_SECOND,
        "force_zeros_for_empty_prompt": Used(True, FLAG),
        "requires_aesthetics_score": Unused("the U-Net's width states it"),
        "add_watermarker": Unused("marks finished images"),
    },
}
"""Schemas of `model_index.json`, without and with XL."""

# diffusers corrects the scheduler's config of Stable Diffusion 1 and 2 if it lacks these keys.
_MISSING_IN_SCHEDULER = {"steps_offset": 1, "clip_sample": False}

_STEPS, _GUIDANCE = 50, {False: 7.5, True: 5.0}  # diffusers' defaults, of 1.x and 2.x, and of XL


def _read_spec(root: epath.Path, index: Mapping[str, Any]) -> TextToImage:
    is_xl = "XL" in index["_class_name"]
    wanted = "text_encoder_2" if is_xl else "text_encoder"
    values = read_index(root, index, INDEX_KEYS[is_xl], (wanted,))
    network = read_part_config(root / "unet" / "config.json")
    denoiser = unet_keys.read_unet_config(network)
    scheduler = read_part_config(root / "scheduler" / "scheduler_config.json")
    if not is_xl and isinstance(scheduler, Mapping):
        scheduler = {**_MISSING_IN_SCHEDULER, **scheduler}
    scheduling = read_scheduling(scheduler, values["scheduler"])
    autoencoder = autoencoder_folder.read_autoencoder_spec(root / "vae", values["vae"])
    _check_networks(denoiser, autoencoder)
    return TextToImage(
        name=root.resolve().name,
        denoiser=dataclasses.replace(denoiser, num_train_steps=scheduling.schedule.num_train_steps),
        conditioner=_conditioner(root, values, is_xl),
        autoencoder=autoencoder,
        prediction=scheduling.prediction,
        schedule=scheduling.schedule,
        image_size=unet_keys.default_size(network) * autoencoder.downsampling,
        sampler=Sampler(
            solver=scheduling.solver,
            grid=scheduling.grid,
            init_noise=scheduling.init_noise,
            num_steps=_STEPS,
            guidance_scale=_GUIDANCE[is_xl],
        ),
    )


def _check_networks(network: UNet2DConditionConfig, autoencoder: PublishedAutoencoder) -> None:
    """Check what diffusers' pipelines expect of both, and that they fit together."""
    latents = autoencoder.latent_channels
    if network.out_channels != latents or network.extra_channels not in (0, latents + 1):
        raise UserError(
            f"{unet_keys.WHAT}: in_channels is {network.in_channels} and out_channels "
            f"{network.out_channels}: expected the {latents} latent_channels of the autoencoder, "
            f"or {2 * latents + 1} in_channels for inpainting; use another model."
        )
    if isinstance(autoencoder, AutoencoderConfig) and autoencoder.shift_factor:
        raise UserError(
            f"vae/config.json: shift_factor is {autoencoder.shift_factor}, which diffusers' Stable "
            "Diffusion ignores: expected null or 0; use another autoencoder."
        )


def _conditioner(
    root: epath.Path, index: Mapping[str, Any], is_xl: bool
) -> ClipConditioner | StableDiffusionXLConditioner:
    encoders = {
        name: ClipTextEncoder(
            model=clip_keys.read_text_config(
                read_part_config(root / part / "config.json"),
                projected=name == "text_2",
                what=f"{part}/config.json",
            ),
            hidden_layer=-2 if is_xl else None,
            final_norm=not is_xl,
        )
        for name, part in ENCODERS.items()
        if index.get(part) is not None
    }
    if not is_xl:
        return ClipConditioner(text=encoders["text"], masked=False)
    return StableDiffusionXLConditioner(
        **encoders, zero_absent=index["force_zeros_for_empty_prompt"]
    )


def _holds(spec: TextToImage) -> bool:
    return (
        isinstance(spec.denoiser, UNet2DConditionConfig)
        and isinstance(spec.conditioner, ClipConditioner | StableDiffusionXLConditioner)
        and isinstance(spec.autoencoder, AutoencoderConfig | TinyAutoencoderConfig)
    )


def _write_spec(spec: TextToImage) -> WrittenSpec:
    network, autoencoder, conditioner = spec.denoiser, spec.autoencoder, spec.conditioner
    assert isinstance(network, UNet2DConditionConfig)  # by `_holds`
    assert isinstance(autoencoder, AutoencoderConfig | TinyAutoencoderConfig)
    _check_networks(network, autoencoder)
    network_config = unet_keys.write_unet_config(network)
    network_config["sample_size"] = spec.image_size // spec.downsampling
    index: dict[str, Any] = {
        "_class_name": _pipeline_kind(network, encoders=len(conditioner.encoders))
    }
    if isinstance(conditioner, StableDiffusionXLConditioner):
        index["force_zeros_for_empty_prompt"] = conditioner.zero_absent
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index["requires_safety_checker"] = False
    return WrittenSpec(index, network_config, write_scheduling(_scheduling(spec)))


def _scheduling(spec: TextToImage) -> Scheduling:
    sampler, schedule = spec.sampler.resolve(), spec.schedule
    solver, grid = sampler.solver, sampler.grid
    if (
        not isinstance(schedule, ScaledLinear)
        or not isinstance(grid, GRIDS)
        or not isinstance(solver, tuple(SCHEDULERS.values()))
    ):
        raise UserError(
            f"diffusers has no scheduler with {type(schedule).__name__}, {type(grid).__name__} and "
            f"{type(solver).__name__}: expected ScaledLinear, one of "
            f"{', '.join(kind.__name__ for kind in GRIDS)}, and one of "
            f"{', '.join(kind.__name__ for kind in SCHEDULERS.values())}; change the model's "
            "sampler."
        )
    return Scheduling(schedule, spec.prediction, solver, grid, sampler.init_noise)


def _pipeline_kind(network: UNet2DConditionConfig, *, encoders: int) -> str:
    inpaints = "Inpaint" if network.extra_channels else ""
    if network.added_width is None:
        return f"StableDiffusion{inpaints}Pipeline"
    return f"StableDiffusionXL{inpaints if encoders == 2 else 'Img2Img'}Pipeline"


FAMILY = PipelineFamily(
    PIPELINES,
    "unet",
    _read_spec,
    _holds,
    _write_spec,
    unet_keys.unet_from_torch,
    lambda params, config: unet_keys.unet_to_torch(params),
)
