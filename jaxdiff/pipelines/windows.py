"""The windows in which an image larger than the training images, or a seamless one, is sampled."""

from jaxdiff.errors import UserError
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.batching import default_batch_size
from jaxdiff.sampling.multidiffusion import Windows
from jaxdiff.sampling.sampler import ResolvedSampler


def windows_of(
    model: TextToImage,
    size: tuple[int, int],
    sampler: ResolvedSampler,
    batch_size: int,
) -> Windows | None:
    """Return the windows of an image; None for the whole image.

    Args:
      model: whose training images are square and as large as a window.
      size: width and height of the image in pixels.
      sampler: its settings.
      batch_size: images of a batch.

    Raises:
      UserError: settings that do not support windows.
    """
    wrap, overlap = sampler.wrap, sampler.overlap
    if overlap is None and (not any(wrap) or model.denoiser.wraps):
        return None
    if model.is_inpainting:
        raise UserError(
            f"{model.name} is for inpainting, which does not support windows: omit overlap."
        )
    width, height = (x if overlap is None else min(x, model.image_size) for x in size)
    if not any(wrap) and (width, height) == size:
        return None
    if sampler.guidance.has_state or sampler.cache is not None:
        what = "A cache of features" if sampler.cache else "Guidance with a state"
        name = "cache" if sampler.cache else "apg.momentum or the rule"
        raise UserError(f"{what} does not support windows: omit {name}, or overlap and wrap.")
    rows, columns, _ = model.latent_shape(height, width)
    return Windows(
        height=rows,
        width=columns,
        overlap=0.0 if overlap is None else float(overlap),
        wrap=wrap,
        at_a_time=max(1, default_batch_size(width, height) // batch_size),
    )
