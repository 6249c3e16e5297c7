"""Model FLOPs of training, for each thing that can be trained."""

from jaxdiff.models.flops import forward_backward_flops
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
        return forward_backward_flops(task.model.text.flops() + task.model.vision.flops())
    if isinstance(task, AutoencoderTask):
        total = task.model.encode_flops(size, size) + task.model.decode_flops(size, size)
        # The tower sees the image, and the reconstruction there and back.
        seen = 3 * task.perceptual.model.flops() if task.perceptual else 0.0
        return forward_backward_flops(total) + seen
    denoiser = denoiser_flops(task, size)
    # Adapters and a new word need the gradient of what a layer reads, not that of its kernel.
    total = 2 * denoiser if task.denoiser_is_frozen else forward_backward_flops(denoiser)
    for tower in () if read else task.towers.values():
        text = tower.model.flops()
        if tower.trained and tower.lora is None:
            total += forward_backward_flops(text)
        elif tower.trained or task.inversion is not None:
            total += 2 * text
        else:
            total += text
    if task.latents and not encoded:
        total += task.latents.model.encode_flops(size, size)
    return total


def denoiser_flops(task: DiffusionTask, size: int) -> float:
    """Of one evaluation of a task's denoiser for one image of side `size`, in pixels."""
    height, width, _ = task.shape(size, size)
    return task.denoiser.flops(height, width, task.text.model.length)


def recomputed_flops(task: DiffusionTask | AutoencoderTask | ClipTask, size: int) -> float:
    """Of what the backward pass computes again, for one image of side `size`.

    All of the denoiser where its blocks keep their input alone. It is no part of the model FLOPs,
    yet takes its time.
    """
    if isinstance(task, DiffusionTask) and task.denoiser.remat == "full":
        return denoiser_flops(task, size)
    return 0.0
