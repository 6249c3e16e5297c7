"""Check that cached latents and text features equal those that a recipe would compute."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.config.serialization import to_json
from jaxdiff.data.sources.cached_latents import CachedLatents, LatentOptions
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.errors import UserError
from jaxdiff.pretrained.bundle import weights_fingerprint
from jaxdiff.training.recipe import Config
from jaxdiff.training.tasks.diffusion import DiffusionTask


def check_cache(config: Config) -> None:
    """Raise `UserError` for cached latents of other data, or for a task that uses none."""
    source, task, cache = config.data.source, config.task, config.data.cache
    if cache.views or cache.text:
        if isinstance(source, CachedLatents):
            raise UserError(
                f"data.source is the cached latents in {source.path}, which need no caching: set "
                "data.cache.views to 0, or name a source of images."
            )
        check_cachable(task, cache)
    if not isinstance(source, CachedLatents):
        return
    if not isinstance(task, DiffusionTask) or task.model.autoencoder is None:
        raise UserError(
            f"data.source is the cached latents in {source.path} but this recipe trains on images: "
            "expected a diffusion task whose model has an autoencoder; name a source of images."
        )
    source.check()
    if source.has_text:
        check_text_cache(task)
    if source.of is not None and source.provenance != to_json(source.of):
        raise UserError(
            f"The latents in {source.path} were made of other data than data.source.of names: "
            "prepare them again in another folder, or leave data.source.of out."
        )


def check_cachable(task: Any, options: LatentOptions) -> DiffusionTask:
    """Return the task, if latents can be cached for it; else raise `UserError`."""
    if options.views < 1:
        raise UserError(f"latents.views is {options.views}: expected a positive number.")
    if not isinstance(task, DiffusionTask) or task.model.autoencoder is None:
        raise UserError(
            "This recipe has no autoencoder whose latents can be cached: expected a diffusion task "
            "with one, as in configs/produce.py; set data.cache.views to 0."
        )
    if options.text:
        check_text_cache(task)
    return task


def check_text_cache(task: DiffusionTask) -> None:
    """Raise `UserError` for a task whose text features change during training."""
    if task.trainable.trains_text or task.pretrained.text_encoders is None:
        raise UserError(
            "Text is cached for trained text encoders that stay frozen: set "
            "task.trainable.text_encoders to False and name their model in "
            "task.pretrained.text_encoders, or prepare latents without --latents.text."
        )


def check_encoders(
    config: Config, frozen: Mapping[str, Any], tokenizers: Mapping[str, TextTokenizer]
) -> None:
    """Raise `UserError` if cached data were made by other encoders than the recipe's."""
    source, task = config.data.source, config.task
    if not isinstance(source, CachedLatents) or not isinstance(task, DiffusionTask):
        return
    found, wanted = source.space.autoencoder, encoder_fingerprint(task, frozen)
    if found != wanted:
        raise UserError(
            f"The latents in {source.path} were made by another autoencoder ({found[:12]}...) than "
            f"that of task.pretrained.autoencoder ({wanted[:12]}...): prepare them again with this "
            "recipe, or name the autoencoder that made them."
        )
    if source.has_text:
        found, wanted = source.space.text, text_fingerprint(task, frozen, tokenizers)
        if found != wanted:
            raise UserError(
                f"The text in {source.path} was cached with other text encoders, or another "
                f"tokenizer ({str(found)[:12]}...), than the recipe's ({wanted[:12]}...): prepare "
                "it again with this recipe, or name those that made it in "
                "task.pretrained.text_encoders."
            )


def encoder_fingerprint(task: DiffusionTask, params: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of the weights of an autoencoder's encoder."""
    assert task.model.autoencoder is not None
    encoder = task.model.autoencoder.fingerprinted(params["autoencoder"])
    return weights_fingerprint(encoder, dtype=np.float32)


def text_fingerprint(
    task: DiffusionTask, params: Mapping[str, Any], tokenizers: Mapping[str, TextTokenizer]
) -> str:
    """Return the SHA-256, in hex, of everything that text features depend on."""
    conditioner = task.model.conditioner
    weights = weights_fingerprint(params["text_encoders"], dtype=np.float32)
    made_by = [conditioner.fingerprint(tokenizers), weights, conditioner.packed_size]
    return hashlib.sha256(json.dumps(made_by).encode()).hexdigest()
