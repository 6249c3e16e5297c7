"""Whether cached latents, and text, are those that a recipe would have made itself."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jaxdiff.data.sources.cached_latents import CachedLatents, LatentOptions
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.pretrained.load import weights_fingerprint
from jaxdiff.training.recipe import Config, to_json
from jaxdiff.training.tasks.diffusion import DiffusionTask


def check_cache(config: Config) -> None:
    """Raises `UserError` for cached latents of other data, or that the task has no use for."""
    source, task, cache = config.data.source, config.task, config.data.cache
    if cache.views or cache.text:
        if isinstance(source, CachedLatents):
            raise UserError(
                f"data.source is the cached latents in {source.path}, of which there is nothing to "
                "cache: set data.cache.views to 0, or name a source of images."
            )
        check_cachable(task, cache)
    if not isinstance(source, CachedLatents):
        return
    if not isinstance(task, DiffusionTask) or task.latents is None:
        raise UserError(
            f"data.source is the cached latents in {source.path} but this recipe trains on images: "
            "expected a diffusion task with task.latents; name a source of images."
        )
    source.check()
    if source.has_text:
        check_text(task)
    if source.of is not None and source.provenance != to_json(source.of):
        raise UserError(
            f"The latents in {source.path} were made of other data than data.source.of names: "
            "prepare them anew in another folder, or leave data.source.of out."
        )


def check_cachable(task: Any, options: LatentOptions) -> DiffusionTask:
    """The task, if latents can be cached for it; else raises `UserError`."""
    if options.views < 1 or options.batch_size < 1:
        raise UserError(
            f"latents.views is {options.views} and latents.batch_size {options.batch_size}: "
            "expected positive numbers."
        )
    if not isinstance(task, DiffusionTask) or task.latents is None:
        raise UserError(
            "This recipe has no autoencoder to cache latents of: expected a diffusion task with "
            "task.latents, such as that of configs/produce.py; leave the caching of latents out."
        )
    if options.text:
        check_text(task)
    return task


def check_text(task: DiffusionTask) -> None:
    """Raises `UserError` for a task whose captions' features cannot be cached."""
    if task.inversion or any(t.trained or t.pretrained is None for t in task.towers.values()):
        raise UserError(
            "Text is cached of encoders that are trained already and stay as they are: set "
            "task.text.trained to False and name its model in task.text.pretrained, or prepare "
            "latents without --latents.text."
        )


def check_encoders(config: Config, frozen: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Raises `UserError` unless what is cached, if anything is, was made by the recipe's encoders.

    Args:
      config: the recipe.
      frozen: the weights of its frozen parts, on the host.
      tokenizer: of its captions.
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
    if source.has_text and isinstance(config.task, DiffusionTask):
        found, wanted = source.space.text, text_fingerprint(config.task, frozen, tokenizer)
        if found != wanted:
            raise UserError(
                f"The text in {source.path} was cached with other text encoders, or another "
                f"tokenizer ({str(found)[:12]}...), than the recipe's ({wanted[:12]}...): prepare "
                "it anew with this recipe, or name those that made it in task.text."
            )


def encoder_fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of the part of an autoencoder's weights that makes latents."""
    decoding = ("decoder", "post_quant_conv")
    return weights_fingerprint({k: v for k, v in params.items() if k not in decoding})


def text_fingerprint(task: DiffusionTask, frozen: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """SHA-256, in hex, of what makes features of captions: tokenizer, encoders, their layers."""
    towers = {name: dataclasses.replace(t, pretrained=None) for name, t in task.towers.items()}
    weights = weights_fingerprint({name: frozen[name] for name in towers})
    read = {name: to_json(tower) for name, tower in towers.items()}
    made_by = [read, weights, tokenizer.bpe.to_str(), task.text_size]
    return hashlib.sha256(json.dumps(made_by).encode()).hexdigest()
