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
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.denoisers.unet_small import UNetConfig
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.autoencoder import AutoencoderTask
from jaxdiff.training.tasks.clip import ClipTask
from jaxdiff.training.tasks.diffusion import DiffusionTask


def flops_per_image(config: Config) -> float:
    """Of one image in a training step of a recipe, less what its data have cached."""
    data = config.data
    encoded, read = data.gives_latents, data.gives_text
    return training_flops(config.task, data.transforms.size, encoded=encoded, read=read)


def training_flops(
    task: DiffusionTask | AutoencoderTask | ClipTask,
    size: int,
    *,
    encoded: bool = False,
    read: bool = False,
) -> float:
    """Of one image of side `size` in a training step; frozen parts get no gradient.

    `encoded` tells that its latents were cached, so that no autoencoder is run, and `read` that the
    features of its caption were, so that no text encoder is.
    """
    if isinstance(task, ClipTask):
        return three_passes(clip_text_flops(task.model.text) + clip_vision_flops(task.model.vision))
    if isinstance(task, AutoencoderTask):
        sides = {"height": size, "width": size}
        total = encode_flops(task.model, **sides) + decode_flops(task.model, **sides)
        # The tower sees the image, and the reconstruction there and back.
        seen = 3 * clip_vision_flops(task.perceptual.model) if task.perceptual else 0.0
        return three_passes(total) + seen
    denoiser = denoiser_flops(task, size)
    # Adapters and a new word need the gradient of what a layer reads, not that of its kernel.
    total = 2 * denoiser if task.denoiser_is_frozen else three_passes(denoiser)
    for tower in () if read else task.towers.values():
        text = clip_text_flops(tower.model)
        if tower.trained or task.inversion is not None:
            total += three_passes(text) if tower.trained and tower.lora is None else 2 * text
        else:
            total += text
    match task.latents and not encoded and task.latents.model:
        case AutoencoderConfig() as model:
            total += encode_flops(model, height=size, width=size)
        case TinyAutoencoderConfig() as model:
            total += tiny_encode_flops(model, height=size, width=size)
    return total


def denoiser_flops(task: DiffusionTask, size: int) -> float:
    """Of one evaluation of a task's denoiser for one image of side `size`, in pixels."""
    height, width, _ = task.shape(size, size)
    seen = {"height": height, "width": width, "text_length": task.text.model.length}
    match task.denoiser:
        case DiTConfig():
            return dit_flops(task.denoiser, **seen)
        case UNetConfig():
            return unet_flops(task.denoiser, **seen)
        case UNet2DConditionConfig():
            return unet2d_condition_flops(task.denoiser, **seen)


def recomputed_flops(task: DiffusionTask | AutoencoderTask | ClipTask, size: int) -> float:
    """Of what the backward pass computes again, for one image of side `size`.

    All of the denoiser where its blocks keep their input alone. It is no part of the model FLOPs,
    yet takes its time.
    """
    if isinstance(task, DiffusionTask) and task.denoiser.remat == "full":
        return denoiser_flops(task, size)
    return 0.0
