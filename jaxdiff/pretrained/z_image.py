"""Z-Image and Z-Image-Turbo in diffusers' layout (see `pipeline_folder`).

transformer/  vae/  text_encoder/  tokenizer/  scheduler/

diffusers adds s (positive - negative) to the positive prediction: the guidance scale here is 1 + s.
"""

from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxdiff.diffusion.time_grids import AnyGrid, FlowGrid
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioners.z_image import ZImageConditioner
from jaxdiff.models.denoisers.z_image import ZImageConfig
from jaxdiff.models.text_encoders.qwen3 import Qwen3TextEncoder
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained import autoencoder_keys, qwen3_keys, z_image_keys
from jaxdiff.pretrained.config_check import Schema
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

PIPELINES = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")

Z_IMAGE_INDEX_KEYS: Schema = {
    **COMMON_KEYS,
    "transformer": part_key(z_image_keys.KIND),
    "vae": part_key(autoencoder_keys.KIND),
    "text_encoder": part_key(*qwen3_keys.ARCHITECTURES),
    "tokenizer": part_key(),
}
"""Schema of `model_index.json`."""

_TURBO_GRID = FlowGrid(shift=3.0)
_TURBO: dict[str, Any] = {
    "num_steps": 8,
    "guidance_scale": 1.0,
    "guidance": Guidance(distilled=True),
}
_BASE: dict[str, Any] = {"num_steps": 50, "guidance_scale": 6.0}


def _read_spec(root: epath.Path, index: Mapping[str, Any]) -> TextToImage:
    read_index(root, index, Z_IMAGE_INDEX_KEYS, ("transformer", "vae", "text_encoder", "tokenizer"))
    denoiser = z_image_keys.read_z_image_config(
        read_part_config(root / "transformer" / "config.json")
    )
    model = qwen3_keys.read_qwen3_config(read_part_config(root / "text_encoder" / "config.json"))
    conditioner = ZImageConditioner(
        text=Qwen3TextEncoder(model=model, hidden_layers=(model.depth - 1,), thinking=True)
    )
    autoencoder = autoencoder_keys.read_autoencoder_config(
        read_part_config(root / "vae" / "config.json")
    )
    scheduling = read_flow_scheduling(
        read_part_config(root / "scheduler" / "scheduler_config.json")
    )
    sampler = Sampler(**scheduling._asdict(), **_defaults(scheduling.grid))
    return flow_spec(root, denoiser, conditioner, autoencoder, sampler)


def _defaults(grid: AnyGrid) -> dict[str, Any]:
    """Return steps and guidance scale. Nothing but the shift differs in the configs of Turbo."""
    return _TURBO if grid == _TURBO_GRID else _BASE


def _holds(spec: TextToImage) -> bool:
    return (
        isinstance(spec.denoiser, ZImageConfig)
        and isinstance(spec.conditioner, ZImageConditioner)
        and isinstance(spec.autoencoder, AutoencoderConfig)
    )


def _write_spec(spec: TextToImage) -> WrittenSpec:
    assert isinstance(spec.denoiser, ZImageConfig)  # by `_holds`
    sampler = spec.sampler.resolve()
    return WrittenSpec(
        {"_class_name": PIPELINES[0]},
        z_image_keys.write_z_image_config(spec.denoiser),
        write_flow_scheduling(FlowScheduling(sampler.solver, sampler.grid)),
    )


FAMILY = PipelineFamily(
    PIPELINES,
    "transformer",
    _read_spec,
    _holds,
    _write_spec,
    z_image_keys.z_image_from_torch,
    lambda params, config: z_image_keys.z_image_to_torch(params),
)
