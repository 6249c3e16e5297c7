"""FLUX.1 and FLUX.2 klein in diffusers' layout (see `pipeline_folder`).

transformer/  vae/  text_encoder/  tokenizer/  scheduler/
text_encoder_2/  tokenizer_2/                             FLUX.1's T5

The index of FLUX.2 klein says whether the model is distilled, FLUX.1's transformer whether it reads
the guidance scale: "dev" does and "schnell" does not.
"""

from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxdiff.models.autoencoders.flux2 import Flux2AutoencoderConfig
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioners.flux1 import Flux1Conditioner
from jaxdiff.models.conditioners.flux2 import Flux2Conditioner
from jaxdiff.models.conditioning import ClipTextEncoder
from jaxdiff.models.denoisers.flux import FluxConfig
from jaxdiff.models.text_encoders.qwen3 import Qwen3TextEncoder
from jaxdiff.models.text_encoders.t5 import T5TextEncoder
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained import autoencoder_keys, clip_keys, flux_keys, qwen3_keys, t5_keys
from jaxdiff.pretrained.config_check import FLAG, Schema, Used
from jaxdiff.pretrained.flow_scheduler import (
    FlowScheduling,
    read_flow_scheduling,
    write_flow_scheduling,
)
from jaxdiff.pretrained.pipeline_folder import (
    COMMON_KEYS,
    PipelineFamily,
    WrittenSpec,
    flow_spec,
    part_key,
    read_index,
    read_part_config,
)
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.sampler import Sampler

FLUX1_PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
FLUX2_PIPELINES = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")

FLUX1_INDEX_KEYS: Schema = {
    **COMMON_KEYS,
    "transformer": part_key(flux_keys.FLUX1_KIND),
    "vae": part_key(autoencoder_keys.KIND),
    "text_encoder": part_key("CLIPTextModel"),
    "tokenizer": part_key(),
    "text_encoder_2": part_key(t5_keys.ARCHITECTURE),
    "tokenizer_2": part_key(),
}
"""Schema of the `model_index.json` of FLUX.1."""

FLUX2_INDEX_KEYS: Schema = {
    **COMMON_KEYS,
    "transformer": part_key(flux_keys.FLUX2_KIND),
    "vae": part_key(autoencoder_keys.FLUX2_KIND),
    "text_encoder": part_key(*qwen3_keys.ARCHITECTURES),
    "tokenizer": part_key(),
    "is_distilled": Used(False, FLAG),
}
"""Schema of the `model_index.json` of FLUX.2 klein."""

HIDDEN_LAYERS = (9, 18, 27)
"""Hidden states of Qwen3 that FLUX.2 klein reads."""

_T5_LENGTH = {True: 512, False: 256}  # of dev, and of schnell
_DEV: dict[str, Any] = {"num_steps": 28, "guidance_scale": 3.5}
_BASE: dict[str, Any] = {"num_steps": 50, "guidance_scale": 4.0}
_DISTILLED: dict[str, Any] = {
    "num_steps": 4,
    "guidance_scale": 1.0,
    "guidance": Guidance(distilled=True),
}


def _read_spec(root: epath.Path, index: Mapping[str, Any]) -> TextToImage:
    if index["_class_name"] in FLUX1_PIPELINES:
        return _read_flux1(root, index)
    values = read_index(
        root, index, FLUX2_INDEX_KEYS, ("transformer", "vae", "text_encoder", "tokenizer")
    )
    denoiser = flux_keys.read_flux2_config(read_part_config(root / "transformer" / "config.json"))
    model = qwen3_keys.read_qwen3_config(read_part_config(root / "text_encoder" / "config.json"))
    conditioner = Flux2Conditioner(
        text=Qwen3TextEncoder(model=model, hidden_layers=HIDDEN_LAYERS, thinking=False)
    )
    autoencoder = autoencoder_keys.read_flux2_autoencoder_config(
        read_part_config(root / "vae" / "config.json")
    )
    scheduler = read_part_config(root / "scheduler" / "scheduler_config.json")
    scheduling = read_flow_scheduling(scheduler, by_steps=True)
    defaults = _DISTILLED if values["is_distilled"] else _BASE
    sampler = Sampler(**scheduling._asdict(), **defaults)
    return flow_spec(root, denoiser, conditioner, autoencoder, sampler)


def _read_flux1(root: epath.Path, index: Mapping[str, Any]) -> TextToImage:
    read_index(
        root, index, FLUX1_INDEX_KEYS, ("transformer", "vae", "text_encoder", "text_encoder_2")
    )
    denoiser = flux_keys.read_flux1_config(read_part_config(root / "transformer" / "config.json"))
    clip = clip_keys.read_text_config(
        read_part_config(root / "text_encoder" / "config.json"),
        projected=False,
        what="text_encoder/config.json",
    )
    t5 = t5_keys.read_t5_config(read_part_config(root / "text_encoder_2" / "config.json"))
    conditioner = Flux1Conditioner(
        text=ClipTextEncoder(model=clip),
        text_2=T5TextEncoder(model=t5, max_length=_T5_LENGTH[denoiser.guidance_embedding]),
    )
    autoencoder = autoencoder_keys.read_autoencoder_config(
        read_part_config(root / "vae" / "config.json")
    )
    scheduling = read_flow_scheduling(
        read_part_config(root / "scheduler" / "scheduler_config.json")
    )
    defaults = _DEV if denoiser.guidance_embedding else _DISTILLED
    sampler = Sampler(**scheduling._asdict(), **defaults)
    return flow_spec(root, denoiser, conditioner, autoencoder, sampler)


def _holds(spec: TextToImage) -> bool:
    kinds = type(spec.conditioner), type(spec.autoencoder)
    return isinstance(spec.denoiser, FluxConfig) and kinds in (
        (Flux1Conditioner, AutoencoderConfig),
        (Flux2Conditioner, Flux2AutoencoderConfig),
    )


def _write_spec(spec: TextToImage) -> WrittenSpec:
    assert isinstance(spec.denoiser, FluxConfig)  # by `_holds`
    network, sampler = flux_keys.write_flux_config(spec.denoiser), spec.sampler.resolve()
    if flux_keys.is_flux1(spec.denoiser):
        index: dict[str, Any] = {"_class_name": FLUX1_PIPELINES[0]}
        index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
    else:
        distilled = spec.sampler.guidance is not None and spec.sampler.guidance.distilled
        index = {"_class_name": FLUX2_PIPELINES[0], "is_distilled": bool(distilled)}
    scheduler = write_flow_scheduling(FlowScheduling(sampler.solver, sampler.grid))
    return WrittenSpec(index, network, scheduler)


FAMILY = PipelineFamily(
    (*FLUX1_PIPELINES, *FLUX2_PIPELINES),
    "transformer",
    _read_spec,
    _holds,
    _write_spec,
    flux_keys.flux_from_torch,
    flux_keys.flux_to_torch,
)
