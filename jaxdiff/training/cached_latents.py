"""Whether cached latents are those that a recipe would have made itself."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.bundle import weights_fingerprint
from jaxdiff.config import Config, to_json
from jaxdiff.data.cached_latents import CachedLatents
from jaxdiff.errors import UserError
from jaxdiff.training.diffusion import DiffusionTask


def check_cache(config: Config) -> None:
    """Raises `UserError` for cached latents of other data, or that the task has no use for."""
    source, task = config.data.source, config.task
    if not isinstance(source, CachedLatents):
        return
    if not isinstance(task, DiffusionTask) or task.latents is None:
        raise UserError(
            f"data.source is the cached latents in {source.path} but this recipe trains on images: "
            "expected a diffusion task with task.latents; name a source of images."
        )
    source.check()
    if source.of is not None and source.made_of != to_json(source.of):
        raise UserError(
            f"The latents in {source.path} were made of other data than data.source.of names: "
            "prepare them anew in another folder, or leave data.source.of out."
        )


def check_autoencoder(config: Config, frozen: Mapping[str, Any]) -> None:
    """Raises `UserError` unless cached latents, if there are any, are of the recipe's autoencoder.

    Args:
      config: the recipe.
      frozen: the weights of its frozen parts, on the host.
    """
    source = config.data.source
    if not isinstance(source, CachedLatents):
        return
    found, wanted = source.space.autoencoder, encoder_fingerprint(frozen["autoencoder"])
    if found != wanted:
        raise UserError(
            f"The latents in {source.path} were made by another autoencoder ({found[:12]}...) than "
            f"that of task.latents ({wanted[:12]}...): prepare them anew with this recipe, or name "
            "the autoencoder that made them."
        )


def encoder_fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of the part of an autoencoder's weights that makes latents."""
    decoding = ("decoder", "post_quant_conv")
    return weights_fingerprint({k: v for k, v in params.items() if k not in decoding})
