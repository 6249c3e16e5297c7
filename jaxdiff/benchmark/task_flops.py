"""Model FLOPs of training, for each thing that can be trained."""

from jaxdiff.benchmark.flops import (
    clip_text_flops,
    clip_vision_flops,
    decode_flops,
    dit_flops,
    encode_flops,
    three_passes,
    tiny_encode_flops,
    unet2d_condition_flops,
    unet_flops,
)
from jaxdiff.models.autoencoder import AutoencoderConfig
from jaxdiff.models.autoencoder_tiny import TinyAutoencoderConfig
from jaxdiff.models.dit import DiTConfig
from jaxdiff.models.unet import UNetConfig
from jaxdiff.models.unet2d_condition import UNet2DConditionConfig
from jaxdiff.training.autoencoder import AutoencoderTask
from jaxdiff.training.clip import ClipTask
from jaxdiff.training.diffusion import DiffusionTask


def training_flops(task: DiffusionTask | AutoencoderTask | ClipTask, size: int) -> float:
    """Of one image of side `size` in a training step; frozen parts get no gradient."""
    if isinstance(task, ClipTask):
        return three_passes(clip_text_flops(task.model.text) + clip_vision_flops(task.model.vision))
    if isinstance(task, AutoencoderTask):
        sides = {"height": size, "width": size}
        total = encode_flops(task.model, **sides) + decode_flops(task.model, **sides)
        # The tower sees the image, and the reconstruction there and back.
        seen = 3 * clip_vision_flops(task.perceptual.model) if task.perceptual else 0.0
        return three_passes(total) + seen
    height, width, _ = task.shape(size, size)
    seen = {"height": height, "width": width, "text_length": task.text.model.length}
    match task.denoiser:
        case DiTConfig():
            denoiser = dit_flops(task.denoiser, **seen)
        case UNetConfig():
            denoiser = unet_flops(task.denoiser, **seen)
        case UNet2DConditionConfig():
            denoiser = unet2d_condition_flops(task.denoiser, **seen)
    # Adapters and a new word need the gradient of what a layer reads, not that of its kernel.
    total = 2 * denoiser if task.denoiser_is_frozen else three_passes(denoiser)
    for tower in task.towers.values():
        text = clip_text_flops(tower.model)
        if tower.trained or task.inversion is not None:
            total += three_passes(text) if tower.trained and tower.lora is None else 2 * text
        else:
            total += text
    match task.latents and task.latents.model:
        case AutoencoderConfig() as model:
            total += encode_flops(model, height=size, width=size)
        case TinyAutoencoderConfig() as model:
            total += tiny_encode_flops(model, height=size, width=size)
    return total
